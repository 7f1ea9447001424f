"""Memory of one worker, by kind, at the moment of a step that needs most.

Model state is that of the ZeRO paper (`memory.model_state_bytes`). What DeepSpeed 0.19 holds in
addition is counted as its code allocates it: the bucket of reductions (two with overlap) and its
flat copy, ZeRO-3's gathered weights (`gathered_weights`), and a flat float32 copy of a partition's
gradients at the update. Not counted is what lies outside torch's allocator (CUDA context, NCCL),
and fragmentation; `gpus.HEADROOM` leaves room for them. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from dist_ft.config.schema import RunConfig
from dist_ft.planning import gathered_weights
from dist_ft.planning.memory import model_state_bytes
from dist_ft.planning.model_shape import ModelShape, PeakBytes

NO_ACTIVATIONS = PeakBytes(0, 0)
SUB_GROUP = 1_000_000_000
"""Elements of a partition that ZeRO-3 updates at once (DeepSpeed's stage3 default)."""
BUCKET = 500_000_000
"""Elements of a bucket of reductions (DeepSpeed's default)."""


@dataclass(frozen=True)
class WorkerSetup:
    """How a run is laid out, as far as memory depends on it.

    Attributes:
        world: number of workers; at least 1.
        stage: ZeRO stage; 0 also for the plain engine.
        dtype: type of weights and activations.
        optimizer: its name.
        num_weight_copies: float32 copies next to the optimizer's state.
        lanes: micro-batches per step of the busiest worker.
        plain: one process without DeepSpeed.
        overlap: reductions overlap with the backward pass (on GPUs).
        zero: DeepSpeed's `zero_optimization`.
        has_moments: False for SGD without momentum.
        offload_optimizer: where the optimizer state lies: none (the GPU), cpu or nvme.
        offload_param: the same of the weights.
    """

    world: int
    stage: int
    dtype: str
    optimizer: str
    num_weight_copies: int
    lanes: int
    plain: bool
    overlap: bool
    zero: Mapping[str, Any]
    has_moments: bool = True
    offload_optimizer: str = "none"
    offload_param: str = "none"


@dataclass(frozen=True)
class WorkerMemory:
    """Bytes of one worker.

    Attributes:
        gpu: on the GPU by kind, at the moment when most is held.
        host: moved off the GPU, by kind.
        when: that moment: "forward" or "backward" of a lane, "gather" (ZeRO-3, before its
            activations), "reduction" (after them) or "update".
    """

    gpu: dict[str, int]
    host: dict[str, int]
    when: str

    @property
    def total(self) -> int:
        """Bytes on the GPU."""
        return sum(self.gpu.values())


class _GatheredBytes(NamedTuple):
    """Bytes of ZeRO-3's gathered weights.

    Attributes:
        persistent: at all times.
        most: at the peak.
        gather: bytes of the largest gather in progress, which is allocated twice.
    """

    persistent: int
    most: int
    gather: int


class _BufferBytes(NamedTuple):
    """Bytes of reduction buffers.

    Attributes:
        buckets: always allocated.
        reduction: additional bytes during a reduction.
        during_backward: whether reductions run while activations exist. They do if gradients fill
            more than a bucket or are reduced during the backward pass; else after it.
    """

    buckets: int
    reduction: int
    during_backward: bool


def worker_setup(
    config: RunConfig,
    zero: Mapping[str, Any],
    world: int,
    stage: int | None = None,
    offload: bool = True,
) -> WorkerSetup:
    """Return how `config` is laid out over `world` workers.

    Args:
        config: config of the run.
        zero: `zero_optimization` of the run's DeepSpeed config.
        world: number of workers.
        stage: another ZeRO stage; None: the run's.
        offload: False: without the run's offload.
    """
    plain = config.max_workers == 0
    if stage is None:
        stage = 0 if plain else config.zero.stage

    # float32 copies: the weights to stay near (EWC: also their Fisher information), the average
    num_anchor_copies = {"none": 0, "l2": 1, "ewc": 2}[config.tuning.anchor.method]
    num_average_copies = int(config.tuning.ema_decay > 0)

    # DeepSpeed offloads only what a stage partitions
    offload_optimizer = offload_param = "none"
    if offload and stage >= 1:
        offload_optimizer = config.zero.offload_optimizer
    if offload and stage == 3:
        offload_param = config.zero.offload_param

    return WorkerSetup(
        world=world,
        stage=stage,
        dtype=config.model.dtype,
        optimizer=config.optimizer.name,
        has_moments=config.optimizer.name != "sgd" or config.optimizer.momentum > 0,
        num_weight_copies=num_anchor_copies + num_average_copies,
        lanes=-(-config.num_lanes // world),
        plain=plain and stage == 0,
        overlap=bool(zero.get("overlap_comm", config.cluster.gpus_per_worker > 0)),
        zero=zero,
        offload_optimizer=offload_optimizer,
        offload_param=offload_param,
    )


def peak_memory(shape: ModelShape, setup: WorkerSetup) -> WorkerMemory:
    """Return what the busiest worker holds at its peak."""
    state = _model_state(shape, setup)
    gathered = _gathered_bytes(shape, setup)
    buffers = _buffer_bytes(shape, setup)

    # from ZeRO-2 on, each gradient is passed on to its partition as soon as it exists
    lane = shape.added if setup.stage < 2 else shape.passed

    def moment(
        gathered_bytes: int, buffer_bytes: int, held: PeakBytes = NO_ACTIVATIONS
    ) -> dict[str, int]:
        return {
            **state,
            "gathered weights": gathered_bytes,
            "buffers": buffer_bytes,
            "activations": held.activations,
            "logits": held.logits,
        }

    # The bucket of ZeRO-1 stays from the first backward pass on, that of ZeRO-2 is allocated for
    # each, and ZeRO-3 always has its own.
    has_bucket_in_forward = setup.stage == 3 or (setup.stage == 1 and setup.lanes > 1)
    forward_buffers = buffers.buckets if has_bucket_in_forward else 0
    backward_buffers = buffers.buckets
    if buffers.during_backward:
        backward_buffers += buffers.reduction

    moments = {
        "forward": moment(gathered.most, forward_buffers, lane.forward),
        "backward": moment(gathered.most, backward_buffers, lane.backward),
        "gather": moment(gathered.most, buffers.buckets + gathered.gather),
        "reduction": moment(gathered.persistent, buffers.buckets + buffers.reduction),
        "update": moment(gathered.persistent, _update_bytes(shape, setup)),
    }

    host = _offload(moments, state, shape, setup)
    when = max(moments, key=lambda name: sum(moments[name].values()))
    return WorkerMemory(moments[when], host, when)


def _offload(
    moments: dict[str, dict[str, int]],
    state: dict[str, int],
    shape: ModelShape,
    setup: WorkerSetup,
) -> dict[str, int]:
    """Remove from `moments` what is offloaded, and return the bytes that the host holds by kind."""
    offloaded: list[str] = []
    if setup.offload_optimizer != "none":
        offloaded += ["optimizer", "gradients"]
    if setup.offload_param != "none":
        offloaded += ["weights"]

    host: dict[str, int] = {}
    for kind in offloaded:
        host[kind] = state[kind]
        for held in moments.values():
            held[kind] = 0

    # the update runs on the host, where the flat copy of the gradients is then
    if "optimizer" in offloaded:
        moments["update"]["buffers"] = 0
        if setup.stage < 3:
            # the gradient of one weight, on its way to the host
            sizes = [weight.numel for weight in shape.weights if weight.trainable]
            moments["backward"]["buffers"] += _weight_bytes(setup) * max(sizes, default=0)

    return host


def _model_state(shape: ModelShape, setup: WorkerSetup) -> dict[str, int]:
    """Return the bytes of weights, gradients and optimizer state.

    ZeRO-3 rounds up each weight by itself.
    """
    state = model_state_bytes(
        shape.num_parameters,
        setup.world,
        setup.stage,
        setup.dtype,
        setup.optimizer,
        shape.num_trainable,
        setup.num_weight_copies,
    )

    # `model_state_bytes` counts SGD with momentum. The moments are subtracted with the same
    # rounding with which they were added.
    if not setup.has_moments:
        moment_bytes = 4 * shape.num_trainable
        state["optimizer"] -= -(-moment_bytes // setup.world) if setup.stage else moment_bytes

    if setup.plain and setup.dtype != "float32":
        state["gradients"] = 4 * shape.num_trainable  # lanes are summed in float32
    return state


def _gathered_bytes(shape: ModelShape, setup: WorkerSetup) -> _GatheredBytes:
    if setup.stage < 3:
        return _GatheredBytes(0, 0, 0)

    limits = gathered_weights.Limits.from_config(setup.zero)
    elements = gathered_weights.simulate(shape, limits)
    size = _weight_bytes(setup)

    # A single worker holds all weights whole, which the model state counts already. With offload,
    # they are gathered from the host.
    is_alone = setup.world == 1
    if is_alone and setup.offload_param == "none":
        return _GatheredBytes(0, 0, 0)
    return _GatheredBytes(
        persistent=0 if is_alone else size * elements.persistent,
        most=size * elements.most,
        gather=size * elements.at_once,
    )


def _buffer_bytes(shape: ModelShape, setup: WorkerSetup) -> _BufferBytes:
    num_trainable, size = shape.num_trainable, _weight_bytes(setup)
    if setup.plain:
        # the gradients of the current lane, which are not added to the sum yet
        lane_bytes = 0 if setup.dtype == "float32" else size * num_trainable
        return _BufferBytes(lane_bytes, 0, during_backward=False)
    if setup.stage == 0:
        return _BufferBytes(0, 0, during_backward=False)

    bucket = int(setup.zero.get("reduce_bucket_size", BUCKET))
    # a flat copy of what is in the bucket, for the collective
    flat_bytes = 0
    if setup.world > 1:
        flat_bytes = size * min(bucket, num_trainable)

    # ZeRO-2 reduces each lane into a partition of its own, then adds it to that of earlier lanes
    touched = share = -(-num_trainable // setup.world)
    lane_partition_bytes = 0
    if setup.stage == 2:
        touched = _touched_elements(shape, setup.world)
        if setup.lanes > 1:
            lane_partition_bytes = size * touched

    # with overlap, one bucket is filled while the other is reduced
    has_two_buckets = setup.overlap and setup.stage < 3
    bucket_elements = 2 * bucket if has_two_buckets else bucket
    overflows = setup.stage > 1 and num_trainable > bucket
    return _BufferBytes(
        buckets=size * (bucket_elements + max(0, touched - share)),
        reduction=flat_bytes + lane_partition_bytes,
        during_backward=has_two_buckets or overflows,
    )


def _touched_elements(shape: ModelShape, world: int) -> int:
    """Return the elements of all weights of which the busiest worker's partition holds a part.

    ZeRO-2 stores the gradient of a weight that lies across a border whole on both sides of it.
    """
    touched = [0] * world
    for decays in (True, False):  # partitioned separately
        sizes = []
        for weight in shape.weights:
            if weight.trainable and weight.decays is decays:
                sizes.append(weight.numel)

        partition = max(1, -(-sum(sizes) // world))
        start = 0
        for size in sizes:
            first_owner = start // partition
            last_owner = (start + size - 1) // partition
            for owner in range(first_owner, last_owner + 1):
                touched[owner] += size
            start += size

    return max(touched)


def _update_bytes(shape: ModelShape, setup: WorkerSetup) -> int:
    """Return what the update holds in addition to the model state."""
    if setup.stage == 0:
        return 0
    flat_gradients = 4 * -(-shape.num_trainable // setup.world)
    if setup.stage < 3:
        return flat_gradients

    # ZeRO-3 updates one sub-group after the other, and its bucket is never freed
    sub_group_bytes = 4 * int(setup.zero.get("sub_group_size", SUB_GROUP))
    bucket_bytes = _weight_bytes(setup) * int(setup.zero.get("reduce_bucket_size", BUCKET))
    return min(flat_gradients, sub_group_bytes) + bucket_bytes


def _weight_bytes(setup: WorkerSetup) -> int:
    return 4 if setup.dtype == "float32" else 2
