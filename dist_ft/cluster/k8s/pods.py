"""Pod templates of the head and of the workers: restricted, sized, and drained before they end.

Pure.
"""

from __future__ import annotations

import json
from typing import Any

from dist_ft.cluster.k8s.options import Options
from dist_ft.cluster.k8s.sizing import GIB, OBJECT_STORE_BYTES, SHUTDOWN_S, Sizing
from dist_ft.config.schema import RunConfig
from dist_ft.core.private_folders import SHARED_FOLDERS

Json = dict[str, Any]
CONFIG_MOUNT = "/etc/dist_ft"
CACHE_MOUNT = "/var/cache/dist_ft"
HEAD_CPUS = 4
HEAD_MEMORY_GIB = 16
HEAD_DISK_GIB = 20
HEAD_SHARED_GIB = 2
HEAD_CACHE_GIB = 10
RAY_PORTS = {"gcs-server": 6379, "dashboard": 8265, "client": 10001, "metrics": 8080}
USER_ID = 1000
SAVE_SECONDS = "dist-ft/save-seconds"
"""Annotation of worker pods: the estimated seconds of a save, for `dist-ft k8s check`."""
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
"""  # noqa: E501
"""preStop hook of a worker. Ray notifies the run that this node will end, and the run saves. The
pod stays until the deadline, or until nothing runs on it any more (at the end of a job no pod
waits). Not `ray stop`, which would end the raylet and with it the worker that is supposed to save
(kuberay#2606)."""


def drain_lifecycle(seconds: int) -> Json:
    """Return the lifecycle of a worker container that is drained for `seconds`."""
    return {"preStop": {"exec": {"command": ["/bin/bash", "-c", DRAIN.format(seconds=seconds)]}}}


def run_labels(config: RunConfig, component: str | None = None) -> dict[str, str]:
    """Return the labels by which policies select the pods of a run, or of one component of it."""
    labels = {"app.kubernetes.io/part-of": "dist-ft", "app.kubernetes.io/instance": config.run.name}
    if component:
        labels["app.kubernetes.io/component"] = component
    return labels


def head_template(config: RunConfig, options: Options, sizes: Sizing) -> Json:
    """Return the head's template; it runs driver, dashboard and job, and no workers."""
    container = {
        **_container("ray-head", options, CACHE_MOUNT),
        "resources": _resources(HEAD_CPUS, HEAD_MEMORY_GIB, HEAD_DISK_GIB),
        "ports": [{"name": name, "containerPort": port} for name, port in RAY_PORTS.items()],
        "volumeMounts": [
            *_mounts(options),
            {"name": "config", "mountPath": CONFIG_MOUNT, "readOnly": True},
        ],
    }
    config_volume = {"name": "config", "configMap": {"name": f"{config.run.name}-config"}}
    return {
        "metadata": {"labels": run_labels(config, "head"), "annotations": _annotations()},
        "spec": {
            **_pod(options, "head", automount=sizes.elastic),
            "terminationGracePeriodSeconds": SHUTDOWN_S,
            "nodeSelector": {},
            "tolerations": [],
            "containers": [container],
            "volumes": [*_volumes(options, HEAD_SHARED_GIB, HEAD_CACHE_GIB), config_volume],
        },
    }


def worker_template(config: RunConfig, options: Options, sizes: Sizing) -> Json:
    """Return the workers' template: a node's share of the run, kept until it has saved."""
    cache = config.data.cache_dir or CACHE_MOUNT

    # GPU nodes are often tainted with the name of the resource, to keep other pods away
    gpus: dict[str, str] = {}
    tolerations: list[Json] = []
    if sizes.gpus_per_pod:
        gpus = {options.gpu_resource: str(sizes.gpus_per_pod)}
        tolerations = [{"key": options.gpu_resource, "operator": "Exists", "effect": "NoSchedule"}]

    container = {
        **_container("ray-worker", options, cache),
        "resources": _resources(sizes.cpus_per_pod, sizes.memory_gib, sizes.disk_gib, gpus),
        "ports": [{"name": "metrics", "containerPort": RAY_PORTS["metrics"]}],
        "volumeMounts": _mounts(options, cache),
        "lifecycle": drain_lifecycle(sizes.drain_s),
    }

    # downloads from the hub go to the disk that was sized for them
    container["env"] = [*container["env"], {"name": "HF_HOME", "value": f"{cache}/hf"}]

    # Traffic between zones is slow and is billed. Preferred only: a run may be larger than a zone.
    same_zone = {
        "podAffinityTerm": {
            "labelSelector": {"matchLabels": run_labels(config)},
            "topologyKey": "topology.kubernetes.io/zone",
        },
        "weight": 100,
    }
    return {
        "metadata": {
            "labels": run_labels(config, "worker"),
            "annotations": _annotations() | {SAVE_SECONDS: str(sizes.save_s)},
        },
        "spec": {
            **_pod(options, "worker"),
            "terminationGracePeriodSeconds": sizes.grace_s,
            "nodeSelector": dict(pair.split("=", 1) for pair in options.node_selector),
            "tolerations": tolerations,
            "affinity": {
                "podAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [same_zone]}
            },
            "containers": [container],
            "volumes": _volumes(options, sizes.shared_gib, sizes.disk_gib),
        },
    }


def start_params(config: RunConfig, sizes: Sizing) -> dict[str, str]:
    """Return the `ray start` parameters of a worker pod; all are strings."""
    params = {"num-cpus": str(sizes.ray_cpus), "object-store-memory": str(OBJECT_STORE_BYTES)}

    if sizes.gpus_per_pod:
        params["num-gpus"] = str(sizes.gpus_per_pod)
    if config.cluster.resources_per_worker:
        per_pod = {}
        for name, count in config.cluster.resources_per_worker.items():
            per_pod[name] = count * sizes.workers_per_pod
        params["resources"] = json.dumps(json.dumps(per_pod))  # quoted for the shell

    return params


def _annotations() -> dict[str, str]:
    """Return annotations that keep node autoscalers from moving pods."""
    # one for cluster-autoscaler, one for Karpenter
    return {
        "cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
        "karpenter.sh/do-not-disrupt": "true",
    }


def _pod(options: Options, component: str, automount: bool = False) -> Json:
    return {
        "serviceAccountName": "dist-ft",
        "automountServiceAccountToken": automount,
        "priorityClassName": f"dist-ft-{component}",
        # Ray's autoscaler v2 supports no other policy
        "restartPolicy": "Never",
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER_ID,
            "runAsGroup": USER_ID,
            "fsGroup": USER_ID,
            # a volume with millions of files would otherwise be changed file by file at each start
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
    }


def _container(name: str, options: Options, cache: str) -> Json:
    return {
        "name": name,
        "image": options.image,
        "imagePullPolicy": "IfNotPresent",
        "securityContext": SECURITY,
        "env": [
            {"name": "PYTHONUNBUFFERED", "value": "1"},
            # Kubernetes mounts volumes as folders of root that every user may write to. A pod has
            # no other users.
            {"name": SHARED_FOLDERS, "value": cache},
        ],
        # optional: a run that needs no credentials starts without the Secret
        "envFrom": [{"secretRef": {"name": options.secret, "optional": True}}],
    }


def _resources(
    cpus: int, memory_gib: int, disk_gib: int, devices: dict[str, str] | None = None
) -> Json:
    """Return requests that equal limits: the pod is the last to be evicted from a full node."""
    amounts = {
        "cpu": str(cpus),
        "memory": f"{memory_gib}Gi",
        "ephemeral-storage": f"{disk_gib}Gi",
        **(devices or {}),
    }
    return {"requests": amounts, "limits": dict(amounts)}


def _mounts(options: Options, cache: str | None = None) -> list[Json]:
    mounts = [
        {"name": "shared-memory", "mountPath": "/dev/shm"},
        {"name": "cache", "mountPath": cache or CACHE_MOUNT},
    ]

    if options.claim:
        mounts.append({"name": "claim", "mountPath": options.claim_mount})

    return mounts


def _volumes(options: Options, shared_gib: int, disk_gib: int) -> list[Json]:
    volumes: list[Json] = [
        {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": f"{shared_gib}Gi"}},
        {"name": "cache", "emptyDir": {"sizeLimit": f"{disk_gib}Gi"}},
    ]

    if options.claim:
        volumes.append({"name": "claim", "persistentVolumeClaim": {"claimName": options.claim}})

    return volumes


def parse_gibibytes(quantity: str) -> float:
    """Return a Kubernetes quantity in GiB (172Gi, 512Mi, 16G, 1000000).

    Raises:
        ValueError: it is not a number with a known unit.
    """
    # no unit is the end of another one: the order does not matter
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

    for unit, num_bytes in units.items():
        if quantity.endswith(unit):
            return float(quantity[: -len(unit)]) * num_bytes / GIB

    return float(quantity) / GIB
