"""What a run will need, before it exists: batch, memory by kind, traffic, checkpoints, GPUs.

From the config and the model's config.json: `model_trace` counts the model, the rest is arithmetic
(`planning`). No weights are read, no GPU is needed, nothing is written.
"""

from __future__ import annotations

from typing import Any, TypedDict

from dist_ft.config.schema import RunConfig
from dist_ft.core.errors import ConfigError
from dist_ft.engine import deepspeed_config
from dist_ft.planning import gpus, traffic, worker_memory
from dist_ft.planning.batch import batch_arithmetic
from dist_ft.planning.model_shape import ModelShape
from dist_ft.planning.traffic import CheckpointBytes
from dist_ft.planning.worker_memory import WorkerSetup
from dist_ft.runtime.preflight.limit_estimate import limit_lines
from dist_ft.runtime.preflight.model_trace import trace_model


class PlannedModel(TypedDict):
    """The model of a plan.

    Attributes:
        kind: transformers' name of the architecture.
        parameters, trainable: their numbers.
        traced: whether its own code gave the activations; else they are estimated.
    """

    path: str
    kind: str
    parameters: int
    trainable: int
    traced: bool


class PlannedMemory(TypedDict):
    """Memory and traffic of a worker under one ZeRO stage.

    Attributes:
        plain: plain PyTorch, without DeepSpeed.
        chosen: whether this is the run as configured.
        offload: {what: where} for state that is not on the GPU.
        gpu, host: bytes by kind at the peak.
        total: bytes on the GPU at the peak.
        when: phase of the peak.
        elements: sent in a step, by collective.
        sent_bytes: bytes that a worker sends in a step, as published.
        sent_by_deepspeed_bytes: the same, as DeepSpeed sends them.
    """

    stage: int
    plain: bool
    chosen: bool
    offload: dict[str, str]
    gpu: dict[str, int]
    total: int
    when: str
    host: dict[str, int]
    elements: dict[str, int]
    sent_bytes: int
    sent_by_deepspeed_bytes: int


class SmallestCluster(TypedDict):
    """The fewest GPUs that hold the run, at the best ZeRO stage."""

    gpus: int
    stage: int
    nodes: int


class PlannedGpu(TypedDict):
    """Whether the run fits on one type of GPU.

    Attributes:
        gb: memory, in 10^9 bytes.
        usable_bytes: what CUDA, NCCL and fragmentation leave.
        fits: whether the run fits as configured.
        used: share of the memory, 0..1 and above.
        fewest: fewest GPUs for the run as configured; None: it never fits.
        least: smallest cluster at any ZeRO stage; None: it never fits.
    """

    name: str
    gb: int
    usable_bytes: int
    fits: bool
    used: float
    fewest: int | None
    least: SmallestCluster | None


class Plan(TypedDict):
    """A plan as JSON values; sizes in bytes.

    Attributes:
        run: its name.
        batch: lines of the batch arithmetic, by their name.
        memory: the run at each ZeRO stage, and without offload if it has any.
        on_fewest_workers: bytes of a worker on `fewest_workers`.
        checkpoint_copy: bytes of a worker's copy for background checkpoints; False without.
        keep_last: number of the latest checkpoints that are kept.
        limits: lines on run.max_hours and run.max_cost; empty without them.
    """

    run: str
    model: PlannedModel
    batch: dict[str, str]
    workers: int
    fewest_workers: int
    stage: int
    dtype: str
    memory: list[PlannedMemory]
    on_fewest_workers: int
    checkpoint_copy: int
    checkpoint: CheckpointBytes
    keep_last: int
    limits: list[str]
    gpus: list[PlannedGpu]


def plan(
    config: RunConfig,
    *,
    model_config: str | None = None,
    gpu: str | None = None,
    num_gpus: int | None = None,
) -> Plan:
    """Return the plan of a run.

    Args:
        config: the run.
        model_config: a config.json in place of the model's own.
        gpu: one of `gpus.GPUS`, in any spelling; default: all of them.
        num_gpus: number of workers in place of cluster.workers.

    Raises:
        ConfigError, ModelError: with one clear line, for a run that cannot be planned.
    """
    gpu_names = [gpus.canonical_name(gpu)] if gpu is not None else list(gpus.GPUS)
    config = _with_workers(config, num_gpus)
    shape = trace_model(config, model_config)

    # With a default bucket: the table also has stages for which this config sets none.
    zero = {
        "reduce_bucket_size": deepspeed_config.BUCKET_ELEMENTS,
        **deepspeed_config.build_deepspeed_config(config)["zero_optimization"],
    }

    num_workers = max(1, config.max_workers)
    fewest_workers = max(1, config.min_workers)
    setup = worker_memory.worker_setup(config, zero, num_workers)
    fewest_setup = worker_memory.worker_setup(config, zero, fewest_workers)
    checkpoint = traffic.checkpoint_bytes(shape, setup)
    memory = [
        _plan_memory(shape, other, is_chosen=other == setup)
        for other in _setups(config, zero, setup)
    ]

    return {
        "run": config.run.name,
        "model": {
            "path": config.model.path,
            "kind": shape.kind,
            "parameters": shape.num_parameters,
            "trainable": shape.num_trainable,
            "traced": shape.traced,
        },
        "batch": dict(batch_arithmetic(config)),
        "workers": num_workers,
        "fewest_workers": fewest_workers,
        "stage": setup.stage,
        "dtype": config.model.dtype,
        "memory": memory,
        "on_fewest_workers": worker_memory.peak_memory(shape, fewest_setup).total,
        "checkpoint_copy": config.checkpoint.background and checkpoint["per_worker"],
        "checkpoint": checkpoint,
        "keep_last": config.checkpoint.keep_last,
        "limits": list(limit_lines(config)),
        "gpus": [_plan_gpu(name, shape, config, zero, setup) for name in gpu_names],
    }


def _with_workers(config: RunConfig, num_gpus: int | None) -> RunConfig:
    """Return the config with this number of workers, each with a GPU."""
    if num_gpus is None:
        return config

    if not 1 <= num_gpus <= config.num_lanes:
        raise ConfigError(
            [
                f"--gpus={num_gpus}: from 1 to the {config.num_lanes} lanes of a step "
                "(batch.global_batch / batch.micro_batch) are allowed, because a worker needs at "
                "least one lane. Give another number, or raise batch.global_batch."
            ],
            "plan",
        )

    cluster = config.cluster.model_copy(update={"workers": num_gpus, "gpus_per_worker": 1})
    return config.model_copy(update={"cluster": cluster})


def _setups(config: RunConfig, zero: dict[str, Any], configured: WorkerSetup) -> list[WorkerSetup]:
    """Return the run as configured and at each other stage; with offload, also without it."""
    world = configured.world
    setups = [worker_memory.worker_setup(config, zero, world, stage) for stage in range(4)]
    setups[configured.stage] = configured

    without_offload = worker_memory.worker_setup(config, zero, world, offload=False)
    if without_offload != configured:
        setups.append(without_offload)
    return setups


def _plan_memory(shape: ModelShape, setup: WorkerSetup, is_chosen: bool) -> PlannedMemory:
    memory = worker_memory.peak_memory(shape, setup)
    sent = traffic.step_traffic(shape, setup)

    offload = {}
    if setup.offload_optimizer != "none":
        offload["optimizer"] = setup.offload_optimizer
    if setup.offload_param != "none":
        offload["weights"] = setup.offload_param

    return {
        "stage": setup.stage,
        "plain": setup.plain,
        "chosen": is_chosen,
        "offload": offload,
        "gpu": memory.gpu,
        "total": memory.total,
        "when": memory.when,
        "host": memory.host,
        "elements": sent.elements,
        "sent_bytes": sent.sent_bytes,
        "sent_by_deepspeed_bytes": sent.sent_by_deepspeed_bytes,
    }


def _plan_gpu(
    name: str, shape: ModelShape, config: RunConfig, zero: dict[str, Any], setup: WorkerSetup
) -> PlannedGpu:
    """Return whether the run fits on GPUs of this type, and the fewest that hold it."""
    usable_bytes = gpus.usable_bytes(name)

    def fewest(stage: int | None, max_workers: int) -> int | None:
        def bytes_per_worker(world: int) -> int:
            other = worker_memory.worker_setup(config, zero, world, stage)
            return worker_memory.peak_memory(shape, other).total

        return gpus.fewest_workers(bytes_per_worker, max_workers, usable_bytes)

    used_bytes = worker_memory.peak_memory(shape, setup).total

    # ZeRO-0 is for float32 only
    least: SmallestCluster | None = None
    first_stage = 0 if config.model.dtype == "float32" else 1
    for stage in range(first_stage, 4):
        # A worker needs at least one lane, so there are at most as many workers.
        count = fewest(stage, config.num_lanes)

        # Of equal counts the lowest stage stays: higher stages send as much or more.
        if count is not None and (least is None or count < least["gpus"]):
            least = {"gpus": count, "stage": stage, "nodes": -(-count // gpus.GPUS_PER_NODE)}

    # As configured, one process cannot become several.
    max_workers = config.num_lanes if config.max_workers else 1
    return {
        "name": name,
        "gb": gpus.GPUS[name],
        "usable_bytes": usable_bytes,
        "fits": used_bytes <= usable_bytes,
        "used": used_bytes / (gpus.GPUS[name] * 1e9),
        "fewest": fewest(None, max_workers),
        "least": least,
    }
