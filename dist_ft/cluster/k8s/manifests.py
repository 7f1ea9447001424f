"""The objects of a run on Kubernetes: plain values that follow from its config, without a templating tool. Pure.

`k8s/base` in the repository is what this gives for configs/llama-8b.yaml; a test holds them together.
"""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import urlsplit

import yaml

from dist_ft.cluster.k8s import pods
from dist_ft.cluster.k8s.options import Options
from dist_ft.cluster.k8s.pods import CACHE_MOUNT, CONFIG_MOUNT, Json, labels
from dist_ft.cluster.k8s.sizing import OBJECT_STORE_BYTES, Sizing, sizing
from dist_ft.config.schema import RunConfig
from dist_ft.core.errors import ConfigError

RESTARTS = 10
"""New clusters a job may get; each goes on from storage."""
KEPT_S = 600
"""Seconds a finished job's cluster is kept to be looked at."""
ENDINGS = (".jsonl", ".json", ".csv", ".gz", ".zst", ".parquet", ".arrow", ".txt")
LOOK_AGAIN = 3
"""An idle node is kept for so many looks for more nodes, so that the run can take it."""


def objects(config: RunConfig, options: Options) -> dict[str, list[Json]]:
    """Return the objects of the run by file, in the order they are to be made; raises ConfigError."""
    problems = refused(config, options)
    if problems:
        raise ConfigError(problems, f"run {config.run.name} on Kubernetes")
    sizes, config = sizing(config, options), on_cluster(config)
    here = {"namespace": options.namespace, "labels": labels(config)}
    files = {
        "namespace.yaml": [_namespace(options), _denied(options)],
        "priority-class.yaml": [_priority("head", 1100), _priority("worker", 1000)],
        "service-account.yaml": [
            {
                "apiVersion": "v1",
                "kind": "ServiceAccount",
                "metadata": {
                    "name": "dist-ft",
                    "namespace": options.namespace,
                    "labels": {"app.kubernetes.io/part-of": "dist-ft"},
                },
                "automountServiceAccountToken": False,
            }
        ],
        "config.yaml": [
            {
                "apiVersion": "v1",
                "kind": "ConfigMap",
                "metadata": {"name": f"{config.run.name}-config", **here},
                "data": {"run.yaml": as_stored(config)},
            }
        ],
        "network-policy.yaml": [_network(config, here)],
        "disruption-budget.yaml": [
            _budget(config, here, "head", 1),
            _budget(config, here, "worker", sizes.min_pods),
        ],
        "rayjob.yaml": [_job(config, options, sizes, here)],
    }
    if options.claim:
        files["claim.yaml"] = [_claim(options)]
    return files


def refused(config: RunConfig, options: Options) -> list[str]:
    """Return what Kubernetes would refuse of the config, and paths that pods can not see."""
    name = config.run.name
    problems = []
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,45}[a-z0-9])?", name):
        problems.append(
            f"run.name={name}: Kubernetes refuses it as the name of a RayJob; it has to begin with a "
            "letter (a-z), go on with letters, digits and '-', and have at most 47 characters; choose one"
        )
    if not config.max_workers:
        problems.append(
            "cluster.workers=0: one process in this shell, and nothing for Kubernetes to place; set it "
            "to a number of workers, or a range"
        )
    for field, path in _local(config):
        if not (options.claim and path.startswith(options.claim_mount.rstrip("/") + "/")):
            problems.append(
                f"{field}={path}: a local path that no pod sees; allowed: a URL such as s3://bucket/..., "
                f"or a path below a volume that all pods mount (--claim NAME, {options.claim_mount}/...); "
                "change it"
            )
    cache = config.data.cache_dir or CACHE_MOUNT
    if not cache.startswith("/"):
        problems.append(
            f"data.cache_dir={cache}: a pod mounts its disk there; allowed: an absolute path; change it, "
            "or leave it out"
        )
    if config.zero.nvme_path and not f"{config.zero.nvme_path}/".startswith(
        cache.rstrip("/") + "/"
    ):
        problems.append(
            f"zero.nvme_path={config.zero.nvme_path}: pods have a disk at data.cache_dir={cache} alone; "
            "allowed: a folder below it; change it"
        )
    return problems


def _local(config: RunConfig) -> list[tuple[str, str]]:
    """Return (field, path) of all local paths that workers read or write outside their own node."""
    named = [("model.path", config.model.path), ("model.tokenizer", config.model.tokenizer)]
    named += [(f"data.train.{i}.path", source.path) for i, source in enumerate(config.data.train)]
    named += [
        (f"evaluation.data.{i}.path", source.path)
        for i, source in enumerate(config.evaluation.data)
    ]
    files = [
        ("run.storage", config.run.storage),
        ("model.chat_template", config.model.chat_template),
        ("data.augment.synonyms", config.data.augment.synonyms),
    ]
    found = [
        (field, path)
        for field, path in named  # a name of the hub has no dot at its begin, no glob, no ending
        if path and (path[0] in "./~" or "*" in path or path.endswith(ENDINGS))
    ] + [(field, path) for field, path in files if path]
    return [
        (field, path) for field, path in found if "://" not in path or path.startswith("file://")
    ]


def on_cluster(config: RunConfig) -> RunConfig:
    """Return the config as pods run it: in the cluster around them, on their own disk; a lost pod is waited for."""
    cluster = config.cluster.model_copy(update={"address": "auto", "wait_for_nodes": True})
    data = config.data.model_copy(update={"cache_dir": config.data.cache_dir or CACHE_MOUNT})
    return config.model_copy(update={"cluster": cluster, "data": data})


def as_stored(config: RunConfig) -> str:
    """Return what of the config differs from defaults, as YAML; `load_config` makes the same config of it."""
    return yaml.safe_dump(
        config.model_dump(mode="json", exclude_defaults=True),
        sort_keys=False,
        allow_unicode=True,
        width=110,
    )


def entrypoint(*overrides: str) -> str:
    """Return the job's command."""
    return " ".join(
        ["python -m dist_ft.cli train", f"{CONFIG_MOUNT}/run.yaml", *overrides, "--skip-check"]
    )


def _job(config: RunConfig, options: Options, sizes: Sizing, here: Json) -> Json:
    """Return the RayJob: submitted over HTTP, begun anew by a new cluster that goes on from storage."""
    cluster: Json = {
        "rayVersion": options.ray_version,
        "authOptions": {"mode": "token"},
        "enableInTreeAutoscaling": sizes.elastic,
    }
    if options.token_secret:
        cluster["authOptions"]["secretName"] = options.token_secret
    if sizes.elastic:  # it begins with the fewest pods and takes more as they come
        amounts = {"cpu": "500m", "memory": "1Gi"}
        cluster["autoscalerOptions"] = {
            "version": "v2",
            "idleTimeoutSeconds": int(LOOK_AGAIN * config.cluster.resize_interval_s),
            "resources": {"requests": amounts, "limits": dict(amounts)},
            "securityContext": pods.SECURITY,
        }
    cluster["headGroupSpec"] = {
        "serviceType": "ClusterIP",
        "template": pods.head(config, options, sizes),
        "rayStartParams": {
            "num-cpus": "0",
            "dashboard-host": "0.0.0.0",
            "object-store-memory": str(OBJECT_STORE_BYTES),
        },
    }
    cluster["workerGroupSpecs"] = [
        {
            "groupName": "workers",
            "replicas": sizes.min_pods if sizes.elastic else sizes.max_pods,
            "minReplicas": sizes.min_pods,
            "maxReplicas": sizes.max_pods,
            "rayStartParams": pods.start_params(config, sizes),
            "template": pods.worker(config, options, sizes),
        }
    ]
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": config.run.name, **here},
        "spec": {
            "submissionMode": "HTTPMode",
            "entrypoint": entrypoint(),
            "backoffLimit": RESTARTS,
            "runtimeEnvYAML": yaml.safe_dump(
                {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(sizes.drain_s)}}
            ),
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": KEPT_S,
            "suspend": False,
            "rayClusterSpec": cluster,
        },
    }


def _namespace(options: Options) -> Json:
    levels = {
        f"pod-security.kubernetes.io/{mode}": "restricted" for mode in ("enforce", "audit", "warn")
    }
    return {
        "apiVersion": "v1",
        "kind": "Namespace",
        "metadata": {
            "name": options.namespace,
            "labels": {"app.kubernetes.io/part-of": "dist-ft", **levels},
        },
    }


def _denied(options: Options) -> Json:
    """Return the policy that nothing in the namespace is reached unless another one says so."""
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": "deny-ingress", "namespace": options.namespace},
        "spec": {"podSelector": {}, "policyTypes": ["Ingress"]},
    }


def _priority(component: str, value: int) -> Json:
    return {
        "apiVersion": "scheduling.k8s.io/v1",
        "kind": "PriorityClass",
        "metadata": {
            "name": f"dist-ft-{component}",
            "labels": {"app.kubernetes.io/part-of": "dist-ft"},
        },
        "value": value,
        "globalDefault": False,
        "description": f"{component.capitalize()} pods of fine-tuning runs.",
    }


def _network(config: RunConfig, here: Json) -> Json:
    """Return what the run's pods may reach and be reached from: one another; the operator reaches the dashboard."""
    own: Json = {"podSelector": {"matchLabels": labels(config)}}
    operator: Json = {
        "namespaceSelector": {},
        "podSelector": {"matchLabels": {"app.kubernetes.io/name": "kuberay-operator"}},
    }
    names: list[Json] = [
        {
            "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "kube-system"}},
            "podSelector": {"matchLabels": {"k8s-app": "kube-dns"}},
        },
        {"ipBlock": {"cidr": "169.254.20.10/32"}},
    ]  # the node's own cache of names
    world: Json = {
        "ipBlock": {"cidr": "0.0.0.0/0", "except": ["169.254.0.0/16"]}
    }  # not the machine's own identity
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": config.run.name, **here},
        "spec": {
            "podSelector": {"matchLabels": labels(config)},
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [{"from": [own]}, {"from": [operator], "ports": _ports("TCP", 8265)}],
            "egress": [
                {"to": [own]},
                {"to": names, "ports": _ports("UDP", 53) + _ports("TCP", 53)},
                *_google(config),
                {"to": [world], "ports": _ports("TCP", *_outside(config))},
            ],
        },
    }


def _google(config: RunConfig) -> list[Json]:
    """Return the way to GKE's metadata server, by which pods have an identity for gs://; none for other stores."""
    urls = [config.run.storage, config.model.path, *(source.path for source in config.data.train)]
    if not any(url.startswith(("gs://", "gcs://")) for url in urls):
        return []
    peers = [{"ipBlock": {"cidr": f"169.254.169.{last}/32"}} for last in (252, 254)]
    return [{"to": peers, "ports": _ports("TCP", 80, 987, 988)}]


def _outside(config: RunConfig) -> list[int]:
    """Return ports of object stores, hubs and the API server: 443, 6443 and those `storage.options` name."""
    found = {443, 6443}
    for settings in config.storage.options.values():
        url = urlsplit(str(settings.get("endpoint_url") or ""))
        found |= {url.port or (80 if url.scheme == "http" else 443)} if url.hostname else set()
    return sorted(found)


def _ports(protocol: str, *numbers: int) -> list[Json]:
    return [{"protocol": protocol, "port": number} for number in numbers]


def _budget(config: RunConfig, here: Json, component: str, fewest: int) -> Json:
    """Return how many pods voluntary disruptions leave: a number, as nothing with a scale owns these pods."""
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": {**here, "name": f"{config.run.name}-{component}"},
        "spec": {
            "minAvailable": fewest,
            "unhealthyPodEvictionPolicy": "AlwaysAllow",
            "selector": {"matchLabels": labels(config, component)},
        },
    }


def _claim(options: Options) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {
            "name": options.claim,
            "namespace": options.namespace,
            "labels": {"app.kubernetes.io/part-of": "dist-ft"},
        },
        "spec": {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "1Ti"}}},
    }
