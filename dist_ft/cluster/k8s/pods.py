"""Pod templates of the head and of the workers: restricted, sized, and drained before they end. Pure."""

from __future__ import annotations

import json
from typing import Any

from dist_ft.cluster.k8s.options import Options
from dist_ft.cluster.k8s.sizing import GIB, LEAVING_S, OBJECT_STORE_BYTES, Sizing
from dist_ft.config.schema import RunConfig

Json = dict[str, Any]
CONFIG_MOUNT = "/etc/dist_ft"
CACHE_MOUNT = "/var/cache/dist_ft"
HEAD_CPUS, HEAD_GIB = 4, 16
USER = 1000
SAVE_SECONDS = "dist-ft/save-seconds"
"""Annotation of worker pods: what a save was reckoned to take; `dist-ft k8s check` asks for as much grace."""
SECURITY: Json = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "runAsNonRoot": True,
    "seccompProfile": {"type": "RuntimeDefault"},
}
DRAIN = """\
busy() {{ grep -ahoE 'ray::[A-Za-z_]+' /proc/[0-9]*/cmdline | grep -qvE 'ray::(IDLE|DashboardAgent|RuntimeEnvAgent)'; }}
node=$(grep -ahoE 'node_id=[0-9a-f]{{56}}' /proc/[0-9]*/cmdline | head -n 1 | cut -d= -f2)
busy && ray drain-node --address "$RAY_ADDRESS" --node-id "$node" --reason DRAIN_NODE_REASON_PREEMPTION \\
  --reason-message "Kubernetes takes this pod away" --deadline-remaining-seconds {seconds}
while busy && [ "$SECONDS" -lt {seconds} ]; do sleep 1; done
"""
"""preStop of a worker. Ray tells the run that this node goes, and the run saves; the pod is held until then, or until
nothing runs on it any more (at the end of a job no pod waits for nothing). Not `ray stop`, which would end the raylet
and with it the worker that is to save (kuberay#2606)."""


def drain(seconds: int) -> Json:
    """Return the lifecycle of a worker container that is drained for `seconds`."""
    return {"preStop": {"exec": {"command": ["/bin/bash", "-c", DRAIN.format(seconds=seconds)]}}}


def labels(config: RunConfig, component: str | None = None) -> dict[str, str]:
    """Return the labels by which policies find what belongs to the run."""
    found = {"app.kubernetes.io/part-of": "dist-ft", "app.kubernetes.io/instance": config.run.name}
    return found | ({"app.kubernetes.io/component": component} if component else {})


def head(config: RunConfig, options: Options, sizes: Sizing) -> Json:
    """Return the head's template: no work is placed there; the driver, the dashboard and the job run on it."""
    container = {
        **_container("ray-head", options),
        "resources": _resources(HEAD_CPUS, HEAD_GIB, 20),
        "ports": [
            {"name": name, "containerPort": port}
            for name, port in (
                ("gcs-server", 6379),
                ("dashboard", 8265),
                ("client", 10001),
                ("metrics", 8080),
            )
        ],
        "volumeMounts": [
            *_mounts(options),
            {"name": "config", "mountPath": CONFIG_MOUNT, "readOnly": True},
        ],
    }
    return {
        "metadata": {"labels": labels(config, "head"), "annotations": _annotations()},
        "spec": {
            **_pod(options, "head", automount=sizes.elastic),
            "terminationGracePeriodSeconds": LEAVING_S,
            "nodeSelector": {},
            "tolerations": [],
            "containers": [container],
            "volumes": [
                *_volumes(options, 2, 10),
                {"name": "config", "configMap": {"name": f"{config.run.name}-config"}},
            ],
        },
    }


def worker(config: RunConfig, options: Options, sizes: Sizing) -> Json:
    """Return the workers' template: a node's share of the run, held until it is saved."""
    container = {
        **_container("ray-worker", options),
        "resources": _resources(
            sizes.cpus_per_pod,
            sizes.memory_gib,
            sizes.disk_gib,
            {options.gpu_resource: str(sizes.gpus_per_pod)} if sizes.gpus_per_pod else {},
        ),
        "ports": [{"name": "metrics", "containerPort": 8080}],
        "volumeMounts": _mounts(options, config.data.cache_dir or CACHE_MOUNT),
        "lifecycle": drain(sizes.drain_s),
    }
    container["env"] = [
        *container["env"],
        {"name": "HF_HOME", "value": f"{config.data.cache_dir or CACHE_MOUNT}/hf"},
    ]
    near = {
        "podAffinityTerm": {
            "labelSelector": {"matchLabels": labels(config)},
            "topologyKey": "topology.kubernetes.io/zone",
        },
        "weight": 100,
    }
    return {
        "metadata": {
            "labels": labels(config, "worker"),
            "annotations": _annotations() | {SAVE_SECONDS: str(sizes.save_s)},
        },
        "spec": {
            **_pod(options, "worker"),
            "terminationGracePeriodSeconds": sizes.grace_s,
            "nodeSelector": dict(pair.split("=", 1) for pair in options.node_selector),
            "tolerations": [
                {"key": options.gpu_resource, "operator": "Exists", "effect": "NoSchedule"}
            ]
            if sizes.gpus_per_pod
            else [],
            "affinity": {
                "podAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [near]}
            },
            "containers": [container],
            "volumes": _volumes(options, sizes.shared_gib, sizes.disk_gib),
        },
    }


def start_params(config: RunConfig, sizes: Sizing) -> dict[str, str]:
    """Return `ray start` parameters of a worker pod; all are text."""
    params = {"num-cpus": str(sizes.ray_cpus), "object-store-memory": str(OBJECT_STORE_BYTES)}
    if sizes.gpus_per_pod:
        params["num-gpus"] = str(sizes.gpus_per_pod)
    if config.cluster.resources_per_worker:
        each = {
            name: count * sizes.workers_per_pod
            for name, count in config.cluster.resources_per_worker.items()
        }
        params["resources"] = json.dumps(json.dumps(each))  # it passes through a shell
    return params


def _annotations() -> dict[str, str]:
    """Return what asks autoscalers of nodes not to move pods for tidiness' sake."""
    return {
        "cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
        "karpenter.sh/do-not-disrupt": "true",
    }


def _pod(options: Options, component: str, automount: bool = False) -> Json:
    return {
        "serviceAccountName": "dist-ft",
        "automountServiceAccountToken": automount,
        "priorityClassName": f"dist-ft-{component}",
        "restartPolicy": "Never",
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
    }


def _container(name: str, options: Options) -> Json:
    return {
        "name": name,
        "image": options.image,
        "imagePullPolicy": "IfNotPresent",
        "securityContext": SECURITY,
        "env": [{"name": "PYTHONUNBUFFERED", "value": "1"}],
        "envFrom": [{"secretRef": {"name": options.secret, "optional": True}}],
    }


def _resources(
    cpus: int, memory_gib: int, disk_gib: int, more: dict[str, str] | None = None
) -> Json:
    """Return requests that equal limits: the pod is the last to be evicted when a node runs short."""
    amounts = {
        "cpu": str(cpus),
        "memory": f"{memory_gib}Gi",
        "ephemeral-storage": f"{disk_gib}Gi",
        **(more or {}),
    }
    return {"requests": amounts, "limits": dict(amounts)}


def _mounts(options: Options, cache: str | None = None) -> list[Json]:
    mounts = [
        {"name": "shared-memory", "mountPath": "/dev/shm"},
        {"name": "cache", "mountPath": cache or CACHE_MOUNT},
    ]
    return [
        *mounts,
        *([{"name": "claim", "mountPath": options.claim_mount}] if options.claim else []),
    ]


def _volumes(options: Options, shared_gib: int, disk_gib: int) -> list[Json]:
    volumes: list[Json] = [
        {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": f"{shared_gib}Gi"}},
        {"name": "cache", "emptyDir": {"sizeLimit": f"{disk_gib}Gi"}},
    ]
    if options.claim:
        volumes.append({"name": "claim", "persistentVolumeClaim": {"claimName": options.claim}})
    return volumes


def gibibytes(size: str) -> float:
    """Return a Kubernetes quantity in GiB (172Gi, 512Mi, 16G, 1000000)."""
    units = {
        "Ki": 2**10,
        "Mi": 2**20,
        "Gi": GIB,
        "Ti": 2**40,
        "k": 1e3,
        "M": 1e6,
        "G": 1e9,
        "T": 1e12,
    }
    for unit, factor in units.items():
        if size.endswith(unit):
            return float(size[: -len(unit)]) * factor / GIB
    return float(size) / GIB
