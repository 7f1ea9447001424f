"""What is added to a run's manifests: components by name, and the overlays made of them. Pure.

`k8s/components` and `k8s/overlays` are these, written as kustomize takes them; `dist-ft k8s render --overlay` applies
the same operations without it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dist_ft.cluster.k8s.manifests import KEPT_S, entrypoint
from dist_ft.cluster.k8s.options import Options
from dist_ft.cluster.k8s.patch import Part, Patch
from dist_ft.cluster.k8s.pods import Json, drain
from dist_ft.cluster.k8s.sizing import LEAVING_S, Sizing
from dist_ft.config.schema import RunConfig

CLUSTER = "/spec/rayClusterSpec"
GROUP = f"{CLUSTER}/workerGroupSpecs/0"
WORKER = f"{GROUP}/template/spec"
HEAD = f"{CLUSTER}/headGroupSpec/template/spec"
SPOT_LOST_S = 10
"""Of a spot node's notice, until the pod hears of it."""
SPOT_RESTARTS = 50
TRIED_STEPS = 20
"""Steps of a run in the development overlay."""
COMPONENTS = ("kueue", "spot", "efa", "rdma", "s3-service-account", "gcs-fault-tolerance")
OVERLAYS: dict[str, tuple[tuple[str, ...], str]] = {
    "development": ((), "development"),
    "production": (("s3-service-account",), "production"),
    "production-spot": (("s3-service-account", "spot"), "production"),
}
"""Of each: the components it takes, in this order, and the part of its own, which is applied last."""


def parts(config: RunConfig, options: Options, sizes: Sizing) -> dict[str, Part]:
    """Return every component by name, for this run."""
    made: dict[str, Callable[[], Part]] = {
        "kueue": lambda: _kueue(options, sizes),
        "spot": lambda: _spot(options, sizes),
        "efa": lambda: _efa(options),
        "rdma": lambda: _rdma(options),
        "s3-service-account": lambda: _s3(options),
        "gcs-fault-tolerance": lambda: _redis(config, options),
        "development": lambda: _development(config, options, sizes),
        "production": lambda: _production(config, options),
    }
    return {name: make() for name, make in made.items()}


def _set(path: str, value: Any) -> Json:
    return {"op": "replace", "path": path, "value": value}


def _add(path: str, value: Any) -> Json:
    return {"op": "add", "path": path, "value": value}


def _fixed(sizes: Sizing, pods: int) -> list[Json]:
    """Return what makes an elastic run's group one of `pods`, which nobody scales."""
    ops = [_set(f"{GROUP}/{field}", pods) for field in ("replicas", "minReplicas", "maxReplicas")]
    if sizes.elastic:
        ops += [
            _set(f"{CLUSTER}/enableInTreeAutoscaling", False),
            _set(f"{HEAD}/automountServiceAccountToken", False),
        ]
    return ops


def _kueue(options: Options, sizes: Sizing) -> Part:
    return Part(
        "Kueue admits the job when its queue has quota for all of it; the queue must exist.",
        [
            Patch(
                "RayJob",
                [
                    _add("/metadata/labels/kueue.x-k8s.io~1queue-name", options.queue),
                    _set("/spec/suspend", True),
                    *_fixed(sizes, sizes.max_pods),
                ],
            )
        ],
    )


def _spot(options: Options, sizes: Sizing) -> Part:
    key, value = options.spot_label.split("=", 1)
    seconds = min(sizes.drain_s, options.spot_notice_s - SPOT_LOST_S)
    escaped = key.replace("~", "~0").replace("/", "~1")
    elsewhere = {
        "requiredDuringSchedulingIgnoredDuringExecution": {
            "nodeSelectorTerms": [
                {"matchExpressions": [{"key": key, "operator": "NotIn", "values": [value]}]}
            ]
        }
    }
    return Part(
        "Workers on spot nodes, drained within their notice; the head on others.",
        [
            Patch(
                "RayJob",
                [
                    _add(f"{WORKER}/nodeSelector/{escaped}", value),
                    _add(
                        f"{WORKER}/tolerations/-",
                        {"key": key, "operator": "Equal", "value": value, "effect": "NoSchedule"},
                    ),
                    _set(f"{WORKER}/containers/0/lifecycle", drain(seconds)),
                    _set(f"{WORKER}/terminationGracePeriodSeconds", seconds + LEAVING_S),
                    _add(f"{HEAD}/affinity", {"nodeAffinity": elsewhere}),
                    _set("/spec/backoffLimit", SPOT_RESTARTS),
                ],
            )
        ],
    )


def _own_namespace(
    about: str, options: Options, resources: dict[str, str], more: list[Json]
) -> Part:
    """Return a part that needs locked memory, which the restricted standard does not grant: a namespace of its own."""
    container = f"{WORKER}/containers/0"
    amounts = [
        _add(f"{container}/resources/{kind}/{name.replace('/', '~1')}", amount)
        for kind in ("requests", "limits")
        for name, amount in resources.items()
    ]
    return Part(
        about,
        [
            Patch(
                "Namespace",
                [_set("/metadata/labels/pod-security.kubernetes.io~1enforce", "privileged")],
            ),
            Patch(
                "RayJob",
                [
                    _add(f"{container}/securityContext/capabilities/add", ["IPC_LOCK"]),
                    *amounts,
                    *more,
                ],
            ),
        ],
        namespace=f"{options.namespace}-rdma",
    )


def _efa(options: Options) -> Part:
    container = f"{WORKER}/containers/0"
    return _own_namespace(
        "EFA of AWS: nccl over libfabric, whose plugin the image must hold. Locked memory: a namespace of its own.",
        options,
        {"vpc.amazonaws.com/efa": str(options.efa), "hugepages-2Mi": "5120Mi"},
        [
            _add(f"{container}/env/-", {"name": "FI_PROVIDER", "value": "efa"}),
            _add(f"{container}/env/-", {"name": "FI_EFA_USE_DEVICE_RDMA", "value": "1"}),
        ],
    )


def _rdma(options: Options) -> Part:
    return _own_namespace(
        "InfiniBand or RoCE through a shared device plugin. Locked memory: a namespace of its own.",
        options,
        {options.rdma_resource: "1"},
        [],
    )


def _s3(options: Options) -> Part:
    return Part(
        "S3 by the role of the service account: no keys anywhere. Put your own role in (--s3-role).",
        [
            Patch(
                "ServiceAccount",
                [_add("/metadata/annotations", {"eks.amazonaws.com/role-arn": options.s3_role})],
            )
        ],
    )


def _redis(config: RunConfig, options: Options) -> Part:
    port = int(options.redis.rsplit(":", 1)[1])
    password = {"valueFrom": {"secretKeyRef": {"name": options.redis_secret, "key": "password"}}}
    peers: list[Json] = [
        {"namespaceSelector": {}},
        {"ipBlock": {"cidr": "0.0.0.0/0", "except": ["169.254.0.0/16"]}},
    ]
    return Part(
        "Ray's control plane keeps its state in a Redis of yours: worker pods outlive a lost head, and the "
        "job goes on from storage.",
        [
            Patch(
                "RayJob",
                [
                    _add(
                        f"{CLUSTER}/gcsFaultToleranceOptions",
                        {"redisAddress": options.redis, "redisPassword": password},
                    )
                ],
            ),
            Patch(
                "NetworkPolicy",
                [
                    _add(
                        "/spec/egress/-",
                        {"to": peers, "ports": [{"protocol": "TCP", "port": port}]},
                    )
                ],
                config.run.name,
            ),
        ],
    )


def _development(config: RunConfig, options: Options, sizes: Sizing) -> Part:
    """Return what makes a short try of the run; the model must fit one node."""
    name = f"{config.run.name[:43].rstrip('-')}-dev"
    overrides = [
        f"run.name={name}",
        f"cluster.workers={sizes.workers_per_pod}",
        "schedule.epochs=null",
        f"schedule.steps={TRIED_STEPS}",
    ]
    return Part(
        "A short try on one node: another run by name, in a namespace of its own, kept longer to look at.",
        [
            Patch(
                "RayJob",
                [
                    _set("/spec/entrypoint", entrypoint(*overrides)),
                    _set("/spec/backoffLimit", 1),
                    _set("/spec/ttlSecondsAfterFinished", 6 * KEPT_S),
                    *_fixed(sizes, 1),
                ],
            ),
            Patch(
                "PodDisruptionBudget", [_set("/spec/minAvailable", 1)], f"{config.run.name}-worker"
            ),
        ],
        namespace=f"{options.namespace}-dev",
    )


def _production(config: RunConfig, options: Options) -> Part:
    peer = {
        "namespaceSelector": {
            "matchLabels": {"kubernetes.io/metadata.name": options.metrics_namespace}
        }
    }
    return Part(
        "Production: S3 by the role of a service account, metrics for Prometheus.",
        [
            Patch(
                "NetworkPolicy",
                [
                    _add(
                        "/spec/ingress/-",
                        {"from": [peer], "ports": [{"protocol": "TCP", "port": 8080}]},
                    )
                ],
                config.run.name,
            )
        ],
    )
