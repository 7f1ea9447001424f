"""Rules of the KubeRay operator itself, which the API server does not know, as of v1.7.

An object that breaks one is created, but the operator only writes an event and starts nothing, so
`dist-ft k8s check` reports it. Source: the operator's validation of RayJob and RayCluster
(ray-operator/controllers/ray/utils/validation.go), with its default feature gates. Not all of its
rules are here.

The types of fields are not checked here. The schema has done that; for an object without a schema,
`check` reports the error of a rule that meets an unexpected type.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from dist_ft.cluster.k8s.load_manifests import Problem, lookup
from dist_ft.core import yaml_documents

MAX_NAME_LENGTH = {"RayJob": 47, "RayCluster": 53}
MIN_RAY_FOR_TOKEN_AUTH = (2, 52, 0)
AUTOSCALER_V2 = "RAY_enable_autoscaler_v2"
"""Environment variable of the head that enables version 2 of the autoscaler."""
FEATURE_GATES = {
    "networkPolicy": "RayClusterNetworkPolicy",
    "tlsOptions": "RayClusterMTLS",
    "historyServerOptions": "RayClusterHistoryServer",
}
"""Fields of a RayCluster whose feature gate is off by default, with the name of the gate."""


def check_operator_rules(content: dict[str, Any]) -> Iterator[Problem]:
    """Yield the problems of a RayJob or a RayCluster."""
    yield from _check_name(content)
    if content["kind"] == "RayJob":
        yield from _check_job(content)
        cluster, path = lookup(content, "spec", "rayClusterSpec"), "spec.rayClusterSpec"
    else:
        cluster, path = lookup(content, "spec"), "spec"
    if not isinstance(cluster, dict):
        return

    # A RayJob passes its own annotations on to its cluster.
    annotations = lookup(content, "metadata", "annotations", default={})
    for problem in _check_cluster(cluster, annotations):
        yield Problem(f"{path}.{problem.path}", problem.message)


def _check_cluster(cluster: dict[str, Any], annotations: dict[str, str]) -> Iterator[Problem]:
    yield from _check_groups(cluster)
    yield from _check_autoscaling(cluster)
    yield from _check_authentication(cluster)
    yield from _check_features(cluster)
    yield from _check_fault_tolerance(cluster, annotations)


def _check_name(content: dict[str, Any]) -> Iterator[Problem]:
    name = str(lookup(content, "metadata", "name", default=""))
    max_length = MAX_NAME_LENGTH[content["kind"]]

    # The operator appends suffixes to the name, and a service's name has at most 63 characters.
    if len(name) > max_length:
        yield Problem(
            "metadata.name",
            f"has {len(name)} characters. The operator allows at most {max_length}. Shorten it.",
        )

    if name and not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        yield Problem(
            "metadata.name",
            "is not allowed by the operator. It must consist of letters a-z, digits and '-', start "
            "with a letter and not end with '-'. Use another name.",
        )


def _check_job(content: dict[str, Any]) -> Iterator[Problem]:
    spec = lookup(content, "spec", default={})
    has_shutdown = lookup(spec, "shutdownAfterJobFinishes", default=False)
    is_suspended = lookup(spec, "suspend", default=False)
    selector = lookup(spec, "clusterSelector")
    mode = lookup(spec, "submissionMode", default="K8sJobMode")
    backoff = lookup(spec, "backoffLimit", default=0)

    if not has_shutdown and lookup(spec, "ttlSecondsAfterFinished", default=0) > 0:
        yield Problem(
            "spec.ttlSecondsAfterFinished",
            "needs shutdownAfterJobFinishes: true. Set that, or remove it.",
        )

    if not has_shutdown and is_suspended:
        yield Problem("spec.suspend", "needs shutdownAfterJobFinishes: true. Set that.")

    if selector is None and lookup(spec, "rayClusterSpec") is None:
        yield Problem("spec", "has neither rayClusterSpec nor clusterSelector. Add one.")

    if selector is not None and (backoff > 0 or is_suspended):
        yield Problem(
            "spec.clusterSelector",
            "cannot be combined with backoffLimit or suspend. Remove it or those.",
        )

    if mode == "InteractiveMode" and backoff > 0:
        yield Problem(
            "spec.backoffLimit",
            "cannot be combined with InteractiveMode. Remove it, or use HTTPMode.",
        )

    minimums = {
        "backoffLimit": 0,
        "ttlSecondsAfterFinished": 0,
        "activeDeadlineSeconds": 1,
        "preRunningDeadlineSeconds": 1,
    }
    for field, minimum in minimums.items():
        if isinstance(lookup(spec, field), int) and spec[field] < minimum:
            yield Problem(f"spec.{field}", f"{spec[field]} is below {minimum}. Raise it.")

    yield from _check_deletion(spec, has_shutdown)
    yield from _check_runtime_environment(spec)


def _check_runtime_environment(spec: dict[str, Any]) -> Iterator[Problem]:
    # A string that holds YAML: the schema checks only that it is a string.
    try:
        text = str(lookup(spec, "runtimeEnvYAML", default="{}"))
        (environment,) = yaml_documents.parse_yaml(text).values
    except (yaml.YAMLError, ValueError):
        environment = None

    if not isinstance(environment, dict):
        yield Problem("spec.runtimeEnvYAML", "is not a YAML mapping. Correct it.")


def _check_deletion(spec: dict[str, Any], has_shutdown: bool) -> Iterator[Problem]:
    strategy = lookup(spec, "deletionStrategy")
    if strategy is None:
        return

    path = "spec.deletionStrategy"
    rules = lookup(strategy, "deletionRules", default=[])
    legacy = [name for name in ("onSuccess", "onFailure") if lookup(strategy, name) is not None]

    if rules and has_shutdown:
        yield Problem(
            f"{path}.deletionRules",
            "cannot be combined with shutdownAfterJobFinishes: true. Remove one of them.",
        )

    if rules and legacy:
        yield Problem(
            path, f"deletionRules cannot be combined with {' and '.join(legacy)}. Remove one."
        )

    # The two legacy fields only work together.
    if not rules and len(legacy) < 2:
        yield Problem(path, "needs deletionRules, or both onSuccess and onFailure. Add these.")

    seen: set[str] = set()
    for index, rule in enumerate(rules):
        rule_path = f"{path}.deletionRules[{index}]"
        condition = lookup(rule, "condition", default={})

        if lookup(condition, "ttlSeconds", default=0) < 0:
            yield Problem(f"{rule_path}.condition.ttlSeconds", "is below 0. Raise it.")

        # As text, because the values of an object without a schema may be lists, which a set cannot
        # hold.
        statuses = condition.get("jobStatus"), condition.get("jobDeploymentStatus")
        key = str((rule.get("policy"), *statuses))
        if key in seen:
            yield Problem(
                rule_path, "another rule has the same policy and condition. Remove one of them."
            )
        seen.add(key)


def ray_groups(cluster: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (path in `cluster`, group) of the head group and of the worker groups."""
    if isinstance(lookup(cluster, "headGroupSpec"), dict):
        yield "headGroupSpec", cluster["headGroupSpec"]

    for index, group in enumerate(lookup(cluster, "workerGroupSpecs", default=[])):
        if isinstance(group, dict):
            yield f"workerGroupSpecs[{index}]", group


def _check_groups(cluster: dict[str, Any]) -> Iterator[Problem]:
    has_autoscaler = lookup(cluster, "enableInTreeAutoscaling", default=False)
    for path, group in ray_groups(cluster):
        params = lookup(group, "rayStartParams", default={})

        if not lookup(group, "template", "spec", "containers"):
            yield Problem(f"{path}.template.spec.containers", "has no container. Add one.")

        resource_params = ("num-cpus", "num-gpus", "memory", "resources")
        in_params = [name for name in resource_params if params.get(name)]
        if in_params and lookup(group, "resources"):
            yield Problem(
                f"{path}.resources",
                f"cannot be combined with rayStartParams of {', '.join(in_params)}. Set resources "
                "in one place.",
            )

        if "labels" in params:
            yield Problem(
                f"{path}.rayStartParams.labels", "is not allowed. Use the group's labels."
            )

        # The head is one pod; only worker groups have a size.
        if path != "headGroupSpec":
            yield from _check_replicas(path, group, has_autoscaler)


def _check_replicas(path: str, group: dict[str, Any], has_autoscaler: bool) -> Iterator[Problem]:
    minimum, maximum = lookup(group, "minReplicas"), lookup(group, "maxReplicas")
    if not has_autoscaler and (minimum is None or maximum is None):
        yield Problem(
            path,
            "without enableInTreeAutoscaling, minReplicas and maxReplicas are required. Set both.",
        )

    if isinstance(minimum, int) and isinstance(maximum, int) and minimum > maximum:
        yield Problem(
            f"{path}.minReplicas", f"{minimum} is more than maxReplicas={maximum}. Lower it."
        )

    if any(isinstance(number, int) and number < 0 for number in (minimum, maximum)):
        yield Problem(path, "minReplicas or maxReplicas is below 0. Raise it.")


def environment_variables(group: dict[str, Any]) -> Mapping[str, Any]:
    """Return the environment of a group's first container, in which Ray runs.

    Name to value; None if the value comes from elsewhere, such as a secret.
    """
    entries = lookup(group, "template", "spec", "containers", 0, "env", default=[])
    variables = {}
    for entry in entries:
        if isinstance(entry, dict):
            variables[str(entry.get("name"))] = entry.get("value")
    return variables


def _check_autoscaling(cluster: dict[str, Any]) -> Iterator[Problem]:
    has_autoscaler = lookup(cluster, "enableInTreeAutoscaling", default=False)
    options = lookup(cluster, "autoscalerOptions", default={})
    head_environment = environment_variables(lookup(cluster, "headGroupSpec", default={}))

    # There are two ways to request version 2. The operator checks restart policies only if it is
    # requested by the option.
    is_v2_by_variable = head_environment.get(AUTOSCALER_V2) in ("1", "true")
    is_v2_by_option = options.get("version") == "v2"

    if is_v2_by_variable and not has_autoscaler:
        yield Problem(
            "headGroupSpec",
            f"{AUTOSCALER_V2} needs enableInTreeAutoscaling: true. Set that, or remove it.",
        )
    if is_v2_by_variable and options.get("version"):
        yield Problem(
            "autoscalerOptions.version",
            f"cannot be combined with {AUTOSCALER_V2} in the head's environment. Remove the "
            "variable.",
        )

    if lookup(options, "idleTimeoutSeconds", default=0) < 0:
        yield Problem("autoscalerOptions.idleTimeoutSeconds", "is below 0. Raise it.")

    has_v2 = (has_autoscaler and is_v2_by_option) or is_v2_by_variable
    for path, group in ray_groups(cluster):
        policy = lookup(group, "template", "spec", "restartPolicy", default="Never")
        if has_autoscaler and is_v2_by_option and policy != "Never":
            yield Problem(
                f"{path}.template.spec.restartPolicy",
                f"{policy} is not supported by autoscaler v2. Set Never.",
            )

        if group.get("suspend") and path != "headGroupSpec":
            yield Problem(
                f"{path}.suspend",
                "suspending a worker group needs a feature that is off by default. Remove it.",
            )

        if has_v2:
            continue

        # Fields of a group that only version 2 supports.
        for field in ("idleTimeoutSeconds", "priority"):
            if lookup(group, field, default=0):
                yield Problem(
                    f"{path}.{field}",
                    "needs autoscaler v2. Set autoscalerOptions.version: v2.",
                )


def _check_authentication(cluster: dict[str, Any]) -> Iterator[Problem]:
    options = lookup(cluster, "authOptions", default={})
    if options.get("mode") != "token":
        if lookup(options, "enableK8sTokenAuth", default=False):
            yield Problem("authOptions.enableK8sTokenAuth", "needs mode: token. Set that.")
        return

    # The pattern is not anchored at the end: nightly versions have a suffix, such as 2.52.0.dev0.
    ray_version = str(lookup(cluster, "rayVersion", default=""))
    match = re.match(r"v?(\d+)\.(\d+)(?:\.(\d+))?", ray_version)
    if not match:
        yield Problem(
            "rayVersion",
            f"is {ray_version or 'missing'}. Token authentication needs at least 2.52.0. Set the "
            "version in the image.",
        )
    elif tuple(int(part or 0) for part in match.groups()) < MIN_RAY_FOR_TOKEN_AUTH:
        yield Problem(
            "rayVersion",
            f"is {ray_version}. Token authentication needs at least 2.52.0. Use a newer Ray.",
        )


def _check_features(cluster: dict[str, Any]) -> Iterator[Problem]:
    for field, gate in FEATURE_GATES.items():
        if lookup(cluster, field) is None:
            continue

        message = f"needs the operator's feature {gate}, which is off by default. Remove it"
        if field == "networkPolicy":
            message += " (the run's own NetworkPolicy does not need it)"
        yield Problem(field, f"{message}.")


def _check_fault_tolerance(
    cluster: dict[str, Any], annotations: dict[str, str]
) -> Iterator[Problem]:
    options = lookup(cluster, "gcsFaultToleranceOptions")
    head = lookup(cluster, "headGroupSpec", default={})
    variables = environment_variables(head)
    params = lookup(head, "rayStartParams", default={})

    if "REDIS_USERNAME" in variables or params.get("redis-username"):
        yield Problem(
            "headGroupSpec",
            "REDIS_USERNAME is not allowed here. Use gcsFaultToleranceOptions.redisUsername.",
        )

    # Without the options, an annotation can enable fault tolerance: the legacy way.
    if options is None:
        is_enabled = annotations.get("ray.io/ft-enabled", "").lower() == "true"
        if "RAY_REDIS_ADDRESS" in variables and not is_enabled:
            yield Problem(
                "headGroupSpec",
                "RAY_REDIS_ADDRESS needs gcsFaultToleranceOptions. Use redisAddress in these.",
            )
        return

    if annotations.get("ray.io/ft-enabled"):
        yield Problem(
            "gcsFaultToleranceOptions",
            "cannot be combined with the annotation ray.io/ft-enabled. Remove the annotation.",
        )

    for name in ("RAY_REDIS_ADDRESS", "REDIS_PASSWORD"):
        if name in variables:
            yield Problem(
                "headGroupSpec",
                f"{name} cannot be combined with gcsFaultToleranceOptions, which sets it. Remove "
                "it.",
            )

    if params.get("redis-password"):
        yield Problem(
            "headGroupSpec.rayStartParams.redis-password",
            "cannot be combined with gcsFaultToleranceOptions. Set it there.",
        )

    backend = lookup(options, "backend", default="redis")
    if backend == "redis" and lookup(options, "storage") is not None:
        yield Problem(
            "gcsFaultToleranceOptions.storage", "is only for the backend rocksdb. Remove it."
        )
