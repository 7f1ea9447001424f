"""Additions to a run's manifests: components by name, and the overlays built from them. Pure.

`k8s/components` and `k8s/overlays` are these in kustomize's form. `dist-ft k8s render --overlay`
applies the same operations without kustomize.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from dist_ft.cluster.k8s.manifests import ALL_ADDRESSES, TTL_S, entrypoint
from dist_ft.cluster.k8s.options import Options
from dist_ft.cluster.k8s.patch import Component, Patch
from dist_ft.cluster.k8s.pods import RAY_PORTS, Json, drain_lifecycle
from dist_ft.cluster.k8s.sizing import SHUTDOWN_S, Sizing
from dist_ft.config.schema import RunConfig

CLUSTER = "/spec/rayClusterSpec"
GROUP = f"{CLUSTER}/workerGroupSpecs/0"
WORKER = f"{GROUP}/template/spec"
WORKER_CONTAINER = f"{WORKER}/containers/0"
HEAD = f"{CLUSTER}/headGroupSpec/template/spec"
SPOT_DELAY_S = 10
"""Seconds from a spot node's notice until the pod receives it."""
SPOT_RESTARTS = 50
DEVELOPMENT_STEPS = 20
"""Steps of a run in the development overlay."""
COMPONENTS = ("kueue", "spot", "efa", "rdma", "s3-service-account", "gcs-fault-tolerance")


class Overlay(NamedTuple):
    """An overlay.

    Attributes:
        components: that it uses, in order.
        own: the name of its own changes, which are applied last.
    """

    components: tuple[str, ...]
    own: str


OVERLAYS: dict[str, Overlay] = {
    "development": Overlay((), "development"),
    "production": Overlay(("s3-service-account",), "production"),
    "production-spot": Overlay(("s3-service-account", "spot"), "production"),
}


def build_components(config: RunConfig, options: Options, sizes: Sizing) -> dict[str, Component]:
    """Return all components, and the overlays' own changes, for this run by name."""
    return {
        "kueue": _kueue(options, sizes),
        "spot": _spot(options, sizes),
        "efa": _efa(options),
        "rdma": _rdma(options),
        "s3-service-account": _s3_service_account(options),
        "gcs-fault-tolerance": _gcs_fault_tolerance(config, options),
        "development": _development(config, options, sizes),
        "production": _production(config, options),
    }


def _replace(path: str, value: Any) -> Json:
    return {"op": "replace", "path": path, "value": value}


def _add(path: str, value: Any) -> Json:
    return {"op": "add", "path": path, "value": value}


def _fixed_size(sizes: Sizing, num_pods: int) -> list[Json]:
    """Return operations that give a run's group `num_pods` pods without autoscaling."""
    fields = ("replicas", "minReplicas", "maxReplicas")

    operations = [_replace(f"{GROUP}/{field}", num_pods) for field in fields]
    # Kueue and a trial decide the size once. Without the autoscaler, the head does not need the
    # token of its service account any more.
    if sizes.elastic:
        operations += [
            _replace(f"{CLUSTER}/enableInTreeAutoscaling", False),
            _replace(f"{HEAD}/automountServiceAccountToken", False),
        ]

    return operations


def _kueue(options: Options, sizes: Sizing) -> Component:
    # Suspended at first: Kueue admits the job as a whole, so it reserves the most pods that the
    # run may use. Growing later would be outside its quota.
    operations = [
        _add("/metadata/labels/kueue.x-k8s.io~1queue-name", options.queue),
        _replace("/spec/suspend", True),
        *_fixed_size(sizes, sizes.max_pods),
    ]

    return Component(
        "Kueue admits the job when its queue has quota for all of it. The queue must exist.",
        [Patch("RayJob", operations)],
    )


def _spot(options: Options, sizes: Sizing) -> Component:
    key, value = options.spot_label.split("=", 1)
    # in JSON pointers (RFC 6901), "~" is escaped first, as escapes of "/" contain one
    escaped_key = key.replace("~", "~0").replace("/", "~1")

    # the node disappears after its notice, whether the save is complete or not
    drain_s = min(sizes.drain_s, options.spot_notice_s - SPOT_DELAY_S)

    toleration = {"key": key, "operator": "Equal", "value": value, "effect": "NoSchedule"}
    not_on_spot = {"matchExpressions": [{"key": key, "operator": "NotIn", "values": [value]}]}
    node_affinity = {
        "requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [not_on_spot]}
    }

    operations = [
        _add(f"{WORKER}/nodeSelector/{escaped_key}", value),
        _add(f"{WORKER}/tolerations/-", toleration),
        _replace(f"{WORKER_CONTAINER}/lifecycle", drain_lifecycle(drain_s)),
        _replace(f"{WORKER}/terminationGracePeriodSeconds", drain_s + SHUTDOWN_S),
        _add(f"{HEAD}/affinity", {"nodeAffinity": node_affinity}),
        _replace("/spec/backoffLimit", SPOT_RESTARTS),
    ]

    return Component(
        "Workers on spot nodes, drained within the notice; the head on other nodes.",
        [Patch("RayJob", operations)],
    )


def _with_locked_memory(
    about: str, options: Options, devices: dict[str, str], operations: list[Json]
) -> Component:
    """Return a component that needs locked memory.

    The restricted standard does not allow it, so the component uses a separate namespace.
    """
    # Kubernetes requires that requests of devices and huge pages equal their limits
    device_operations = []
    for bound in ("requests", "limits"):
        for name, amount in devices.items():
            path = f"{WORKER_CONTAINER}/resources/{bound}/{name.replace('/', '~1')}"
            device_operations.append(_add(path, amount))

    # RDMA registers memory with the network card, which pins its pages.
    capability = _add(f"{WORKER_CONTAINER}/securityContext/capabilities/add", ["IPC_LOCK"])

    # Only `enforce`: audit and warn stay restricted, so other deviations are still reported.
    level = _replace("/metadata/labels/pod-security.kubernetes.io~1enforce", "privileged")

    return Component(
        about,
        [
            Patch("Namespace", [level]),
            Patch("RayJob", [capability, *device_operations, *operations]),
        ],
        namespace=f"{options.namespace}-rdma",
    )


def _efa(options: Options) -> Component:
    return _with_locked_memory(
        "AWS EFA: NCCL over libfabric, whose plugin the image must contain. Locked memory needs a "
        "separate namespace.",
        options,
        {"vpc.amazonaws.com/efa": str(options.efa), "hugepages-2Mi": "5120Mi"},
        [
            _add(f"{WORKER_CONTAINER}/env/-", {"name": "FI_PROVIDER", "value": "efa"}),
            _add(f"{WORKER_CONTAINER}/env/-", {"name": "FI_EFA_USE_DEVICE_RDMA", "value": "1"}),
        ],
    )


def _rdma(options: Options) -> Component:
    return _with_locked_memory(
        "InfiniBand or RoCE through a shared device plugin. Locked memory needs a separate "
        "namespace.",
        options,
        {options.rdma_resource: "1"},
        [],
    )


def _s3_service_account(options: Options) -> Component:
    role = {"eks.amazonaws.com/role-arn": options.s3_role}
    return Component(
        "S3 by the role of the service account, without keys. Set your own role (--set s3_role=).",
        [Patch("ServiceAccount", [_add("/metadata/annotations", role)])],
    )


def _gcs_fault_tolerance(config: RunConfig, options: Options) -> Component:
    port = int(options.redis.rsplit(":", 1)[1])
    password = {"valueFrom": {"secretKeyRef": {"name": options.redis_secret, "key": "password"}}}
    redis = {"redisAddress": options.redis, "redisPassword": password}

    # The Redis may run in any namespace or outside the cluster; only its port is known.
    peers: list[Json] = [{"namespaceSelector": {}}, {"ipBlock": ALL_ADDRESSES}]
    egress = {"to": peers, "ports": [{"protocol": "TCP", "port": port}]}

    return Component(
        "Ray's control plane stores its state in your Redis: worker pods survive the loss of the "
        "head, and the job resumes from storage.",
        [
            Patch("RayJob", [_add(f"{CLUSTER}/gcsFaultToleranceOptions", redis)]),
            Patch("NetworkPolicy", [_add("/spec/egress/-", egress)], config.run.name),
        ],
    )


def _development(config: RunConfig, options: Options, sizes: Sizing) -> Component:
    """Return the changes for a short trial of the run; the model must fit on one node."""
    # A run of its own name: the trial must not resume the real run. 47 characters are allowed, and
    # "-dev" takes four of them.
    name = f"{config.run.name[:43].rstrip('-')}-dev"
    overrides = [
        f"run.name={name}",
        f"cluster.workers={sizes.workers_per_pod}",
        "schedule.epochs=null",
        f"schedule.steps={DEVELOPMENT_STEPS}",
    ]

    operations = [
        _replace("/spec/entrypoint", entrypoint(*overrides)),
        _replace("/spec/backoffLimit", 1),
        _replace("/spec/ttlSecondsAfterFinished", 6 * TTL_S),
        *_fixed_size(sizes, 1),
    ]

    # the base keeps as many workers as the real run needs, which the one pod could never satisfy
    budget = Patch(
        "PodDisruptionBudget", [_replace("/spec/minAvailable", 1)], f"{config.run.name}-worker"
    )

    return Component(
        "A short trial on one node: a separate run in a separate namespace, which stays longer for "
        "inspection.",
        [Patch("RayJob", operations), budget],
        namespace=f"{options.namespace}-dev",
    )


def _production(config: RunConfig, options: Options) -> Component:
    labels = {"kubernetes.io/metadata.name": options.metrics_namespace}

    ingress = {
        "from": [{"namespaceSelector": {"matchLabels": labels}}],
        "ports": [{"protocol": "TCP", "port": RAY_PORTS["metrics"]}],
    }

    return Component(
        "Production: S3 by the role of a service account, metrics for Prometheus.",
        [Patch("NetworkPolicy", [_add("/spec/ingress/-", ingress)], config.run.name)],
    )
