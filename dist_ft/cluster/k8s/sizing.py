"""How many pods a run needs and how large they are: arithmetic on its config. Pure.

A pod is a node's share of the run: `workers_per_node` workers, each with its GPU. Host memory is
listed by part, so that a person can check the sum; `dist-ft k8s render` prints it.
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
"""Margin on a size in a model's name: an 8B model has 8.03 G parameters, a 7B up to 7.6 G."""
PROCESS_BYTES = 6 * GIB
"""Host memory of a training process: libraries, the CUDA context, pinned buffers, batches."""
SPARE_BYTES = GIB
"""Host memory of a spare process after its imports (measured: 0.5 GB), and its supervisor."""
NODE_BYTES = 8 * GIB
"""Additional host memory of a pod: raylet, agents, file cache."""
OBJECT_STORE_BYTES = GIB
"""Ray's object store on each node; dist_ft sends no data through it."""
SHM_WORKER_BYTES = GIB
"""Shared memory of NCCL or gloo for each worker."""
DISK_BYTES = 20 * GIB
"""Logs, compiled kernels, and room."""
NOTICE_S = 60
"""From the notice to the start of a save: some seconds, then the current step finishes."""
SHUTDOWN_S = 30
"""From the end of the drain until processes are killed."""


@dataclass(frozen=True)
class Sizing:
    """What a run needs.

    Attributes:
        workers_per_pod: workers of a pod; also its GPUs, if the run uses any.
        min_pods: worker pods for the fewest workers.
        max_pods: worker pods for the most workers.
        gpus_per_pod: GPUs that a pod requests.
        cpus_per_pod: CPUs that a pod requests; one more than Ray assigns.
        ray_cpus: CPUs that Ray assigns in a pod.
        memory: bytes of a pod by part.
        shared: bytes of /dev/shm by part; /dev/shm is one of the parts of `memory`.
        disk: bytes of local disk by part.
        parameters: number of parameters of the model.
        by_name: whether `parameters` is derived from the model's name.
        save_s: seconds of a save with the fewest workers.
        drain_s: seconds that a pod is kept after the notice.
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
        """Whether the number of pods may change."""
        return self.min_pods < self.max_pods

    @property
    def memory_gib(self) -> int:
        """Memory of a pod, GiB."""
        return _total_gib(self.memory)

    @property
    def shared_gib(self) -> int:
        """Size of /dev/shm, GiB."""
        return _total_gib(self.shared)

    @property
    def disk_gib(self) -> int:
        """Local disk of a pod, GiB."""
        return _total_gib(self.disk)


def compute_sizing(config: RunConfig, options: Options) -> Sizing:
    """Return what a run needs.

    Raises:
        ConfigError: workers do not fill the nodes, or the model's size is unknown.
    """
    cluster = config.cluster
    parameters = num_parameters(config, options)

    # a run that is smaller than a node gets a pod of its own size
    per_pod = min(cluster.workers_per_node or options.workers_per_node, config.max_workers)
    problems = _find_idle_workers(config, per_pod)
    if problems:
        raise ConfigError(problems, f"run {config.run.name} on Kubernetes")

    # a worker's share of the state, largest with the fewest workers
    share = _state_bytes_per_parameter(config) * parameters / config.min_workers
    save_s = math.ceil(share / (options.storage_mb_s * 1e6))
    drain_s = math.ceil((save_s + NOTICE_S) / 10) * 10

    shared = _shared_memory(config, per_pod, share)
    ray_cpus = math.ceil(per_pod * cluster.cpus_per_worker)

    # min_pods is rounded up, as more workers than the fewest do no harm. max_pods divides without
    # rest (`_find_idle_workers`).
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
        grace_s=drain_s + SHUTDOWN_S,
    )


def num_parameters(config: RunConfig, options: Options) -> float:
    """Return the model's parameters: as given, or from its name with a margin.

    Supports names such as Llama-3.1-8B and Mixtral-8x7B.

    Raises:
        ConfigError: the name contains no size.
    """
    if options.parameters:
        return options.parameters

    name = config.model.path.rstrip("/").rsplit("/", 1)[-1]

    # 8B, 0.5b, 135M, 8x7B; not the 3.1 of "Llama-3.1", and not within a word
    sizes = re.findall(r"(?<![A-Za-z0-9.])(?:(\d+)x)?(\d+(?:\.\d+)?)([BMbm])(?![A-Za-z0-9])", name)
    if not sizes:
        raise ConfigError(
            [
                f"model.path={config.model.path}: the name does not contain the model's size, "
                "which memory and grace periods depend on. Pass --model-config FILE, or "
                "--parameters such as 8e9."
            ],
            f"run {config.run.name} on Kubernetes",
        )

    # the last one, as earlier ones may be part of the family's name
    num_experts, number, unit = sizes[-1]
    scale = 1e9 if unit in "Bb" else 1e6
    return int(num_experts or 1) * float(number) * scale * NAME_MARGIN


def _find_idle_workers(config: RunConfig, per_pod: int) -> list[str]:
    """Return a problem if the last node would be partly idle."""
    # what is missing to the next multiple of `per_pod`
    num_idle = -config.max_workers % per_pod
    if not num_idle:
        return []

    divisors = [number for number in range(1, per_pod) if config.max_workers % number == 0]
    return [
        f"cluster.workers={config.max_workers}: with {per_pod} workers per node, the last node "
        f"has room for {num_idle} more workers that would be paid for but idle. Use a multiple of "
        f"{per_pod}, or --workers-per-node {', '.join(map(str, divisors))}."
    ]


def _state_bytes_per_parameter(config: RunConfig) -> int:
    """Return the bytes per parameter in a checkpoint: master and optimizer state in float32."""
    return model_state_bytes(1, 1, 3, config.model.dtype, config.optimizer.name)["optimizer"]


def _saves_in_background(config: RunConfig) -> bool:
    # a save in the background holds a copy of the state until it is written
    checkpoint = config.checkpoint
    saves = checkpoint.every_steps != 0 or bool(checkpoint.local_folder)
    return checkpoint.background and saves


def _shared_memory(config: RunConfig, per_pod: int, share: float) -> dict[str, int]:
    """Return bytes of /dev/shm by part; `share` is a worker's part of the state in bytes."""
    parts = {"object store": OBJECT_STORE_BYTES, "collectives": per_pod * SHM_WORKER_BYTES}
    if config.checkpoint.local_folder.startswith("/dev/shm"):
        # one that is complete and one that is being written
        parts["checkpoints in memory"] = math.ceil(2 * per_pod * share)
    return parts


def _memory(
    config: RunConfig, per_pod: int, share: float, parameters: float, shared: Mapping[str, int]
) -> dict[str, int]:
    """Return bytes of a pod's memory by part."""
    zero = config.zero
    weight_bytes = 4 if config.model.dtype == "float32" else 2
    parameters_per_worker = parameters / config.min_workers

    parts = {"processes": per_pod * PROCESS_BYTES}
    if config.cluster.standby:
        parts["spares"] = per_pod * SPARE_BYTES
    if _saves_in_background(config):
        parts["save in progress"] = math.ceil(per_pod * share)
    if zero.offload_optimizer == "cpu":
        # with gradients in float32, on their way there
        parts["optimizer offload"] = math.ceil(per_pod * (share + 4 * parameters_per_worker))
    if zero.offload_param == "cpu":
        parts["weights offload"] = math.ceil(per_pod * weight_bytes * parameters_per_worker)
    if zero.stage < 3:
        # each worker reads the whole model before it moves to the GPU
        parts["loading"] = math.ceil(per_pod * weight_bytes * parameters)

    # The parts of /dev/shm are charged to the pod's memory limit, too.
    parts["/dev/shm"] = sum(shared.values())
    parts["node"] = NODE_BYTES
    return parts


def _disk(config: RunConfig, parameters: float) -> dict[str, int]:
    """Return bytes of a pod's local disk by part."""
    # the files of a model may be in float32, whatever type it is trained in
    return {
        "model": math.ceil(4 * parameters),
        "tokenized data": math.ceil(config.data.cache_gib * GIB),
        "logs and room": DISK_BYTES,
    }


def _total_gib(parts: Mapping[str, int]) -> int:
    return math.ceil(sum(parts.values()) / GIB)


def describe_sizing(sizes: Sizing) -> list[tuple[str, str]]:
    """Return (name, arithmetic) rows for a person."""
    pods = f"{sizes.min_pods}..{sizes.max_pods}" if sizes.elastic else str(sizes.max_pods)
    unit = "GPUs" if sizes.gpus_per_pod else "workers"
    max_workers = sizes.max_pods * sizes.workers_per_pod

    grace = (
        f"{sizes.grace_s} s = save {sizes.save_s} + notice {NOTICE_S}, rounded up: drain "
        f"{sizes.drain_s}, + shutdown {SHUTDOWN_S}"
    )

    source = "(given or counted)"
    if sizes.by_name:
        source = "(from the model's name, plus 10 %; --model-config FILE counts them)"

    return [
        ("pods", f"{pods} × {sizes.workers_per_pod} {unit} = up to {max_workers}"),
        ("memory", _describe_parts(sizes.memory)),
        ("/dev/shm", _describe_parts(sizes.shared)),
        ("disk", _describe_parts(sizes.disk)),
        ("grace", grace),
        ("parameters", f"{sizes.parameters / 1e9:.2f} G {source}"),
    ]


def _describe_parts(parts: Mapping[str, int]) -> str:
    listed = " + ".join(f"{part} {size / GIB:.1f}" for part, size in parts.items())
    return f"{_total_gib(parts)} GiB per pod = {listed}"
