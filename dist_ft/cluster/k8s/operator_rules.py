"""What the KubeRay operator refuses after the API server has taken it: its own rules, as of v1.7.

A resource that breaks one is taken, and then nothing happens but an event; so it is said here. Source: the operator's
validation of RayJob and RayCluster (ray-operator/controllers/ray/utils/validation.go), by its default feature gates.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml

from dist_ft.cluster.k8s.load_manifests import at

Problem = tuple[str, str]
NAME_LENGTH = {"RayJob": 47, "RayCluster": 53}
RAY_FOR_TOKENS = (2, 52, 0)
AUTOSCALER_V2 = "RAY_enable_autoscaler_v2"
OFF = {
    "networkPolicy": "RayClusterNetworkPolicy",
    "tlsOptions": "RayClusterMTLS",
    "historyServerOptions": "RayClusterHistoryServer",
}
"""Fields whose feature is off unless the operator is started with it, as of v1.7."""


def problems(content: dict[str, Any]) -> Iterator[Problem]:
    """Yield (path, what is wrong) of a RayJob or a RayCluster."""
    yield from _name(content)
    if content["kind"] == "RayJob":
        yield from _job(content)
        cluster, below = at(content, "spec", "rayClusterSpec"), "spec.rayClusterSpec"
    else:
        cluster, below = at(content, "spec"), "spec"
    if isinstance(cluster, dict):
        annotations = at(content, "metadata", "annotations", default={})
        for rules in (_groups, _autoscaling, _authentication, _features):
            yield from ((f"{below}.{path}", text) for path, text in rules(cluster))
        yield from (
            (f"{below}.{path}", text) for path, text in _fault_tolerance(cluster, annotations)
        )


def _name(content: dict[str, Any]) -> Iterator[Problem]:
    name, most = str(at(content, "metadata", "name", default="")), NAME_LENGTH[content["kind"]]
    if len(name) > most:
        yield (
            "metadata.name",
            f"{len(name)} characters; the operator takes at most {most}; shorten it",
        )
    if name and not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        yield (
            "metadata.name",
            (
                "the operator takes letters a-z, digits and '-', beginning with a letter and not "
                "ending with '-'; choose another"
            ),
        )


def _job(content: dict[str, Any]) -> Iterator[Problem]:
    spec = at(content, "spec", default={})
    stays = not at(spec, "shutdownAfterJobFinishes", default=False)
    selector, mode = at(spec, "clusterSelector"), at(spec, "submissionMode", default="K8sJobMode")
    backoff, ttl = (
        at(spec, "backoffLimit", default=0),
        at(spec, "ttlSecondsAfterFinished", default=0),
    )
    if stays and ttl > 0:
        yield (
            "spec.ttlSecondsAfterFinished",
            "only with shutdownAfterJobFinishes: true; set that, or leave it out",
        )
    if stays and at(spec, "suspend", default=False):
        yield "spec.suspend", "only with shutdownAfterJobFinishes: true; set that"
    if selector is None and at(spec, "rayClusterSpec") is None:
        yield "spec", "neither rayClusterSpec nor clusterSelector; give one"
    if selector is not None and (backoff > 0 or at(spec, "suspend", default=False)):
        yield (
            "spec.clusterSelector",
            "neither with backoffLimit nor with suspend; leave it or those out",
        )
    if mode == "InteractiveMode" and backoff > 0:
        yield "spec.backoffLimit", "not with InteractiveMode; leave it out, or take HTTPMode"
    for field, least in (
        ("backoffLimit", 0),
        ("ttlSecondsAfterFinished", 0),
        ("activeDeadlineSeconds", 1),
        ("preRunningDeadlineSeconds", 1),
    ):
        if isinstance(at(spec, field), int) and spec[field] < least:
            yield f"spec.{field}", f"{spec[field]} is below {least}; raise it"
    yield from _deletion(spec, stays)
    try:
        environment = yaml.safe_load(at(spec, "runtimeEnvYAML", default="{}"))
    except yaml.YAMLError:
        environment = None
    if not isinstance(environment, dict):
        yield "spec.runtimeEnvYAML", "not a mapping in YAML; correct it"


def _deletion(spec: dict[str, Any], stays: bool) -> Iterator[Problem]:
    strategy = at(spec, "deletionStrategy")
    if strategy is None:
        return
    rules = at(strategy, "deletionRules", default=[])
    legacy = [name for name in ("onSuccess", "onFailure") if at(strategy, name) is not None]
    where = "spec.deletionStrategy"
    if rules and not stays:
        yield (
            f"{where}.deletionRules",
            "not with shutdownAfterJobFinishes: true; leave one of them out",
        )
    if rules and legacy:
        yield where, f"deletionRules and {' and '.join(legacy)} exclude one another; leave one out"
    if not rules and len(legacy) < 2:
        yield where, "neither deletionRules nor both of onSuccess and onFailure; give one of them"
    seen: set[str] = set()
    for index, rule in enumerate(rules):
        condition = at(rule, "condition", default={})
        key = str(
            (rule.get("policy"), condition.get("jobStatus"), condition.get("jobDeploymentStatus"))
        )
        if at(condition, "ttlSeconds", default=0) < 0:
            yield f"{where}.deletionRules[{index}].condition.ttlSeconds", "below 0; raise it"
        if key in seen:
            yield (
                f"{where}.deletionRules[{index}]",
                "its policy and condition stand there twice; leave one out",
            )
        seen.add(key)


def groups(cluster: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (path, group) of the head and of the worker groups."""
    if isinstance(at(cluster, "headGroupSpec"), dict):
        yield "headGroupSpec", cluster["headGroupSpec"]
    for index, group in enumerate(at(cluster, "workerGroupSpecs", default=[])):
        if isinstance(group, dict):
            yield f"workerGroupSpecs[{index}]", group


def _groups(cluster: dict[str, Any]) -> Iterator[Problem]:
    scaled = at(cluster, "enableInTreeAutoscaling", default=False)
    for path, group in groups(cluster):
        params = at(group, "rayStartParams", default={})
        if not at(group, "template", "spec", "containers"):
            yield f"{path}.template.spec.containers", "no container; give one"
        both = [
            name for name in ("num-cpus", "num-gpus", "memory", "resources") if params.get(name)
        ]
        if both and at(group, "resources"):
            yield (
                f"{path}.resources",
                f"not beside rayStartParams of {', '.join(both)}; say it in one place",
            )
        if "labels" in params:
            yield f"{path}.rayStartParams.labels", "not taken; use the group's labels"
        if path == "headGroupSpec":
            continue
        least, most = at(group, "minReplicas"), at(group, "maxReplicas")
        if not scaled and (least is None or most is None):
            yield (
                path,
                "minReplicas and maxReplicas are needed where enableInTreeAutoscaling is off; give both",
            )
        if isinstance(least, int) and isinstance(most, int) and least > most:
            yield f"{path}.minReplicas", f"{least} is more than maxReplicas={most}; lower it"
        if any(isinstance(number, int) and number < 0 for number in (least, most)):
            yield path, "minReplicas or maxReplicas is below 0; raise it"


def environment(group: dict[str, Any]) -> dict[str, Any]:
    """Return name and literal value (None: by reference) of the environment of a group's first container."""
    return {
        str(entry.get("name")): entry.get("value")
        for entry in at(group, "template", "spec", "containers", 0, "env", default=[])
        if isinstance(entry, dict)
    }


def _autoscaling(cluster: dict[str, Any]) -> Iterator[Problem]:
    scaled = at(cluster, "enableInTreeAutoscaling", default=False)
    options = at(cluster, "autoscalerOptions", default={})
    asked = environment(at(cluster, "headGroupSpec", default={})).get(AUTOSCALER_V2) in (
        "1",
        "true",
    )
    second = options.get("version") == "v2"
    if asked and not scaled:
        yield (
            "headGroupSpec",
            f"{AUTOSCALER_V2} without enableInTreeAutoscaling: true; set that, or leave it out",
        )
    if asked and options.get("version"):
        yield (
            "autoscalerOptions.version",
            f"not beside {AUTOSCALER_V2} in the head's environment; leave that out",
        )
    if at(options, "idleTimeoutSeconds", default=0) < 0:
        yield "autoscalerOptions.idleTimeoutSeconds", "below 0; raise it"
    for path, group in groups(cluster):
        policy = at(group, "template", "spec", "restartPolicy", default="Never")
        if scaled and second and policy != "Never":
            yield (
                f"{path}.template.spec.restartPolicy",
                f"{policy}: autoscaler v2 wants Never; set that",
            )
        if group.get("suspend") and path != "headGroupSpec":
            yield (
                f"{path}.suspend",
                "a worker group is suspended only by a feature that is off; leave it out",
            )
        if not (scaled and second) and not asked:
            for field in ("idleTimeoutSeconds", "priority"):
                if at(group, field, default=0):
                    yield (
                        f"{path}.{field}",
                        "only with autoscaler v2; set autoscalerOptions.version: v2",
                    )


def _authentication(cluster: dict[str, Any]) -> Iterator[Problem]:
    options = at(cluster, "authOptions", default={})
    if options.get("mode") != "token":
        if at(options, "enableK8sTokenAuth", default=False):
            yield "authOptions.enableK8sTokenAuth", "only with mode: token; set that"
        return
    said = str(at(cluster, "rayVersion", default=""))
    version = re.match(r"v?(\d+)\.(\d+)(?:\.(\d+))?", said)
    if not version:
        yield (
            "rayVersion",
            f"{said or 'none'}: token authentication needs at least 2.52.0; give the image's",
        )
    elif tuple(int(part or 0) for part in version.groups()) < RAY_FOR_TOKENS:
        yield "rayVersion", f"{said}: token authentication came with 2.52.0; take a newer Ray"


def _features(cluster: dict[str, Any]) -> Iterator[Problem]:
    for field, gate in OFF.items():
        if at(cluster, field) is not None:
            yield (
                field,
                (
                    f"needs the operator's feature {gate}, which is off by default; leave it out (a "
                    "NetworkPolicy of the run's own does without)"
                    if field == "networkPolicy"
                    else f"needs the operator's feature {gate}, which is off by default; leave it out"
                ),
            )


def _fault_tolerance(cluster: dict[str, Any], annotations: dict[str, str]) -> Iterator[Problem]:
    options, head = (
        at(cluster, "gcsFaultToleranceOptions"),
        at(cluster, "headGroupSpec", default={}),
    )
    said, params = environment(head), at(head, "rayStartParams", default={})
    if "REDIS_USERNAME" in said or params.get("redis-username"):
        yield (
            "headGroupSpec",
            "no REDIS_USERNAME of its own; use gcsFaultToleranceOptions.redisUsername",
        )
    if options is None:
        if (
            "RAY_REDIS_ADDRESS" in said
            and annotations.get("ray.io/ft-enabled", "").lower() != "true"
        ):
            yield (
                "headGroupSpec",
                "RAY_REDIS_ADDRESS without gcsFaultToleranceOptions; use its redisAddress",
            )
        return
    if annotations.get("ray.io/ft-enabled"):
        yield (
            "gcsFaultToleranceOptions",
            "not beside the annotation ray.io/ft-enabled; leave that out",
        )
    for name in ("RAY_REDIS_ADDRESS", "REDIS_PASSWORD"):
        if name in said:
            yield (
                "headGroupSpec",
                f"no {name} beside gcsFaultToleranceOptions, which says it; leave it out",
            )
    if params.get("redis-password"):
        yield (
            "headGroupSpec.rayStartParams.redis-password",
            "not beside gcsFaultToleranceOptions; use that",
        )
    if at(options, "backend", default="redis") == "redis" and at(options, "storage") is not None:
        yield "gcsFaultToleranceOptions.storage", "only for the backend rocksdb; leave it out"
