"""How many pods a run takes and how large they are: arithmetic on its config. Pure.

A pod is a node's share of the run: `workers_per_node` workers, each with its GPU. What each of them holds in host
memory is written out by part, so that a person can check the sum; `dist-ft k8s render` prints it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from dist_ft.cluster.k8s.options import Options
from dist_ft.config.schema import RunConfig
from dist_ft.core.errors import ConfigError
from dist_ft.planning.memory import model_state_bytes

GIB = 2**30
NAME_MARGIN = 1.1
"""A model that is called 8B has 8.03 G parameters, one called 7B up to 7.6 G."""
PROCESS_BYTES = 6 * GIB
"""Host memory of a process that trains: libraries, the CUDA context, pinned buffers, batches."""
SPARE_BYTES = GIB
"""Of a spare process that has imported everything (measured: 0.5 GB), and its supervisor."""
NODE_BYTES = 8 * GIB
"""Of a pod besides: raylet, agents, file cache to work with."""
OBJECT_STORE_BYTES = GIB
"""Ray's object store on each node; dist_ft sends no data through it."""
SHM_WORKER_BYTES = GIB
"""Shared memory of nccl or gloo, for each worker."""
DISK_BYTES = 20 * GIB
"""Logs, compiled kernels, and room."""
NOTICED_S = 60
"""From the notice until a save begins: it is seen within seconds, then the step under way is finished."""
LEAVING_S = 30
"""From the end of the drain until processes are killed."""


@dataclass(frozen=True)
class Sizing:
    """What a run takes.

    Attributes:
        workers_per_pod: workers of one pod; also its GPUs, if the run uses any.
        min_pods, max_pods: worker pods for the fewest and the most workers.
        gpus_per_pod, cpus_per_pod: what a pod asks for; one CPU more than Ray deals out.
        ray_cpus: CPUs Ray deals out in a pod.
        memory, shared, disk: bytes of a pod by part; `shared` (/dev/shm) is one of the parts of `memory`.
        parameters: of the model, as taken.
        by_name: whether they were taken from the model's name.
        save_s: seconds a save takes with the fewest workers.
        drain_s: seconds a pod is held after the notice.
        grace_s: seconds from the notice until Kubernetes kills.
    """

    workers_per_pod: int
    min_pods: int
    max_pods: int
    gpus_per_pod: int
    cpus_per_pod: int
    ray_cpus: int
    memory: Mapping[str, int]
    shared: Mapping[str, int]
    disk: Mapping[str, int]
    parameters: float
    by_name: bool
    save_s: int
    drain_s: int
    grace_s: int

    @property
    def elastic(self) -> bool:
        """Whether the number of pods may move."""
        return self.min_pods < self.max_pods

    @property
    def memory_gib(self) -> int:
        """Memory of a pod, GiB."""
        return _gib(self.memory)

    @property
    def shared_gib(self) -> int:
        """Size of /dev/shm, GiB."""
        return _gib(self.shared)

    @property
    def disk_gib(self) -> int:
        """Local disk of a pod, GiB."""
        return _gib(self.disk)


def sizing(config: RunConfig, options: Options) -> Sizing:
    """Return what `config` takes; raises ConfigError where workers do not fill nodes or the model's size is unknown."""
    cluster, parameters = config.cluster, num_parameters(config, options)
    per_pod = min(cluster.workers_per_node or options.workers_per_node, config.max_workers)
    problems = _uneven(config, per_pod)
    if problems:
        raise ConfigError(problems, f"run {config.run.name} on Kubernetes")
    share = (
        _state_bytes(config) * parameters / config.min_workers
    )  # of one worker, when there are fewest
    save_s = math.ceil(share / (options.storage_mb_s * 1e6))
    drain_s = math.ceil((save_s + NOTICED_S) / 10) * 10
    shared = _shared(config, per_pod, share)
    ray_cpus = math.ceil(per_pod * cluster.cpus_per_worker)
    return Sizing(
        workers_per_pod=per_pod,
        min_pods=math.ceil(config.min_workers / per_pod),
        max_pods=config.max_workers // per_pod,
        gpus_per_pod=per_pod * cluster.gpus_per_worker,
        cpus_per_pod=ray_cpus + 1,
        ray_cpus=ray_cpus,
        memory=_memory(config, per_pod, share, parameters, shared),
        shared=shared,
        disk=_disk(config, parameters),
        parameters=parameters,
        by_name=not options.parameters,
        save_s=save_s,
        drain_s=drain_s,
        grace_s=drain_s + LEAVING_S,
    )


def num_parameters(config: RunConfig, options: Options) -> float:
    """Return the model's parameters: as told, or by its name (Llama-3.1-8B, Mixtral-8x7B), with a margin then."""
    if options.parameters:
        return options.parameters
    name = config.model.path.rstrip("/").rsplit("/", 1)[-1]
    found = re.findall(r"(?<![A-Za-z0-9.])(?:(\d+)x)?(\d+(?:\.\d+)?)([BMbm])(?![A-Za-z0-9])", name)
    if not found:
        raise ConfigError(
            [
                f"model.path={config.model.path}: its name does not say how large it is, and memory and "
                "grace periods follow from that; give --model-config FILE, or --parameters such as 8e9"
            ],
            f"run {config.run.name} on Kubernetes",
        )
    times, number, unit = found[-1]
    return int(times or 1) * float(number) * (1e9 if unit in "Bb" else 1e6) * NAME_MARGIN


def _uneven(config: RunConfig, per_pod: int) -> list[str]:
    """Say where nodes would stand partly idle."""
    idle = -config.max_workers % per_pod
    if not idle:
        return []
    fit = ", ".join(str(n) for n in range(1, per_pod) if config.max_workers % n == 0)
    return [
        f"cluster.workers={config.max_workers}: with {per_pod} workers a node, {idle} places of the last one would "
        f"be paid for and idle; take a multiple of {per_pod}, or --workers-per-node of {fit}"
    ]


def _state_bytes(config: RunConfig) -> int:
    """Return the bytes a parameter that a checkpoint holds: master and optimizer state in float32."""
    return model_state_bytes(1, 1, 3, config.model.dtype, config.optimizer.name)["optimizer"]


def _saves_in_memory(config: RunConfig) -> bool:
    checkpoint = config.checkpoint
    return checkpoint.background and (checkpoint.every_steps != 0 or bool(checkpoint.local_folder))


def _shared(config: RunConfig, per_pod: int, share: float) -> dict[str, int]:
    """Return bytes of /dev/shm by part."""
    parts = {"object store": OBJECT_STORE_BYTES, "collectives": per_pod * SHM_WORKER_BYTES}
    if config.checkpoint.local_folder.startswith("/dev/shm"):
        parts["checkpoints in memory"] = math.ceil(
            2 * per_pod * share
        )  # one that stands, one being written
    return parts


def _memory(
    config: RunConfig, per_pod: int, share: float, parameters: float, shared: Mapping[str, int]
) -> dict[str, int]:
    """Return bytes of a pod's memory by part."""
    zero, size = config.zero, 4 if config.model.dtype == "float32" else 2
    parts = {"processes": per_pod * PROCESS_BYTES}
    if config.cluster.standby:
        parts["spares"] = per_pod * SPARE_BYTES
    if _saves_in_memory(config):
        parts["a save under way"] = math.ceil(per_pod * share)
    if zero.offload_optimizer == "cpu":  # and gradients in float32, on their way there
        parts["optimizer offload"] = math.ceil(
            per_pod * (share + 4 * parameters / config.min_workers)
        )
    if zero.offload_param == "cpu":
        parts["weights offload"] = math.ceil(per_pod * size * parameters / config.min_workers)
    if zero.stage < 3:  # each worker reads the whole model before it goes to the GPU
        parts["loading"] = math.ceil(per_pod * size * parameters)
    return parts | {"/dev/shm": sum(shared.values()), "node": NODE_BYTES}


def _disk(config: RunConfig, parameters: float) -> dict[str, int]:
    """Return bytes of a pod's local disk by part."""
    return {
        "model": math.ceil(4 * parameters),
        "tokenised data": math.ceil(config.data.cache_gib * GIB),
        "logs and room": DISK_BYTES,
    }


def _gib(parts: Mapping[str, int]) -> int:
    return math.ceil(sum(parts.values()) / GIB)


def described(sizes: Sizing) -> list[tuple[str, str]]:
    """Return (name, arithmetic) rows for a person."""
    pods = f"{sizes.min_pods}..{sizes.max_pods}" if sizes.elastic else str(sizes.max_pods)
    unit = "GPUs" if sizes.gpus_per_pod else "workers"
    rows = [
        (
            "pods",
            f"{pods} × {sizes.workers_per_pod} {unit} = up to {sizes.max_pods * sizes.workers_per_pod}",
        )
    ]
    for name, parts, total in (
        ("memory", sizes.memory, sizes.memory_gib),
        ("/dev/shm", sizes.shared, sizes.shared_gib),
        ("disk", sizes.disk, sizes.disk_gib),
    ):
        rows.append(
            (
                name,
                f"{total} GiB a pod = "
                + " + ".join(f"{part} {size / GIB:.1f}" for part, size in parts.items()),
            )
        )
    return [
        *rows,
        (
            "grace",
            f"{sizes.grace_s} s = save {sizes.save_s} + notice {NOTICED_S}, rounded up: drain "
            f"{sizes.drain_s}, + leaving {LEAVING_S}",
        ),
        (
            "parameters",
            f"{sizes.parameters / 1e9:.2f} G "
            + (
                "(by the model's name, and a tenth more; --model-config FILE counts them)"
                if sizes.by_name
                else "(counted or told)"
            ),
        ),
    ]
