"""Memory of one worker, by kind, at the moment of a step that needs most.

Model state is that of the ZeRO paper (`memory.model_state_bytes`); what DeepSpeed 0.19 holds besides is counted as its
code makes it: the bucket of reductions (two with overlap) and its flat copy, ZeRO-3's gathered weights (`gathered`),
and a flat float32 copy of a partition's gradients at the update. Not counted: what lies outside torch's allocator (CUDA
context, NCCL) and its fragmentation; `gpus.HEADROOM` leaves room for them. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dist_ft.config.schema import RunConfig
from dist_ft.planning import gathered_weights
from dist_ft.planning.memory import model_state_bytes
from dist_ft.planning.model_shape import Held, ModelShape

NOTHING = Held(0, 0)
SUB_GROUP = 1_000_000_000
"""Elements of a partition that ZeRO-3 updates at once (DeepSpeed's stage3 default)."""


@dataclass(frozen=True)
class Setup:
    """How a run is laid out, as far as memory follows from it.

    Attributes:
        world: number of workers; at least 1.
        stage: ZeRO stage; 0 also for the plain engine.
        dtype: of weights and activations.
        optimizer: its name; `has_moments` is False for SGD without momentum.
        guards: float32 copies kept beside the optimizer's state.
        lanes: micro-batches a step of the busiest worker.
        plain: one process without DeepSpeed.
        overlap: reductions go on beside the backward (on GPUs).
        zero: DeepSpeed's `zero_optimization`.
        offload_optimizer, offload_param: state, or weights, lie on the host (or on nvme).
    """

    world: int
    stage: int
    dtype: str
    optimizer: str
    guards: int
    lanes: int
    plain: bool
    overlap: bool
    zero: Mapping[str, Any]
    has_moments: bool = True
    offload_optimizer: str = "none"
    offload_param: str = "none"


@dataclass(frozen=True)
class Memory:
    """Bytes of one worker: `gpu` by kind at the moment most are held, `host` by kind what was moved off it.

    `when` is "forward" or "backward" of a lane, "gather" (ZeRO-3, before its activations), "reduction" (after them) or
    "update".
    """

    gpu: dict[str, int]
    host: dict[str, int]
    when: str

    @property
    def total(self) -> int:
        """On the GPU."""
        return sum(self.gpu.values())


def setup_of(
    config: RunConfig,
    zero: Mapping[str, Any],
    world: int,
    stage: int | None = None,
    offload: bool = True,
) -> Setup:
    """Return how `config` is laid out over `world` workers, at another stage (or without offload) if told so.

    `zero` is the `zero_optimization` of the run's DeepSpeed config.
    """
    plain = config.max_workers == 0
    stage = (0 if plain else config.zero.stage) if stage is None else stage
    anchor = {"none": 0, "l2": 1, "ewc": 2}[config.tuning.anchor.method]
    return Setup(
        world=world,
        stage=stage,
        dtype=config.model.dtype,
        optimizer=config.optimizer.name,
        has_moments=config.optimizer.name != "sgd" or config.optimizer.momentum > 0,
        guards=anchor + (config.tuning.ema_decay > 0),
        lanes=-(-config.num_lanes // world),
        plain=plain and stage == 0,
        overlap=bool(zero.get("overlap_comm", config.cluster.gpus_per_worker > 0)),
        zero=zero,
        offload_optimizer=config.zero.offload_optimizer if offload and stage >= 1 else "none",
        offload_param=config.zero.offload_param if offload and stage == 3 else "none",
    )


def of_worker(shape: ModelShape, setup: Setup) -> Memory:
    """Return what the busiest worker holds at its peak."""
    size = 4 if setup.dtype == "float32" else 2
    state = _state(shape, setup, size)
    lane = shape.added if setup.stage < 2 else shape.passed
    whole, gather = _gathered(shape, setup, size)
    buckets, reducing, meanwhile = _buffers(shape, setup, size)
    stays = _persistent(shape, setup, size)

    def moment(whole: int, buffers: int, held: Held = NOTHING) -> dict[str, int]:
        return {
            **state,
            "gathered weights": whole,
            "buffers": buffers,
            "activations": held.activations,
            "logits": held.logits,
        }

    # the bucket of ZeRO-1 stays from the first backward on, that of ZeRO-2 is made for each; ZeRO-3 has its own always
    there = setup.stage == 3 or (setup.stage == 1 and setup.lanes > 1)
    moments = {
        "forward": moment(whole, buckets * there, lane.forward),
        "backward": moment(whole, buckets + meanwhile * reducing, lane.backward),
        "gather": moment(whole, buckets + gather),
        "reduction": moment(stays, buckets + reducing),
        "update": moment(stays, _at_update(shape, setup, size)),
    }
    host: dict[str, int] = {}
    moved = (["optimizer", "gradients"] if setup.offload_optimizer != "none" else []) + (
        ["weights"] if setup.offload_param != "none" else []
    )
    for kind in moved:
        host[kind] = state[kind]
        for one in moments.values():
            one[kind] = 0
    if "optimizer" in moved:
        moments["update"]["buffers"] = 0
        largest = max((weight.numel for weight in shape.weights if weight.learned), default=0)
        moments["backward"]["buffers"] += (
            size * largest if setup.stage < 3 else 0
        )  # one weight's, on its way
    when = max(moments, key=lambda name: sum(moments[name].values()))
    return Memory(moments[when], host, when)


def _state(shape: ModelShape, setup: Setup, size: int) -> dict[str, int]:
    """Return weights, gradients and optimizer state; of ZeRO-3 each weight is rounded up by itself."""
    state = model_state_bytes(
        shape.num_parameters,
        setup.world,
        setup.stage,
        setup.dtype,
        setup.optimizer,
        shape.num_learned,
        setup.guards,
    )
    if not setup.has_moments:
        per = 4 * shape.num_learned
        state["optimizer"] -= -(-per // setup.world) if setup.stage else per
    if setup.plain and setup.dtype != "float32":
        state["gradients"] = 4 * shape.num_learned  # lanes are summed in float32
    return state


def _gathered(shape: ModelShape, setup: Setup, size: int) -> tuple[int, int]:
    """Return bytes of whole weights at the peak, and of the largest gather under way, which is laid out once more."""
    if setup.stage < 3 or (setup.world == 1 and setup.offload_param == "none"):
        return 0, 0
    found = gathered_weights.play(shape, gathered_weights.Limits.of(setup.zero))
    return size * found.most, size * found.at_once


def _persistent(shape: ModelShape, setup: Setup, size: int) -> int:
    if setup.stage < 3 or setup.world == 1:
        return 0
    return size * gathered_weights.play(shape, gathered_weights.Limits.of(setup.zero)).persistent


def _buffers(shape: ModelShape, setup: Setup, size: int) -> tuple[int, int, bool]:
    """Return bytes of the buckets, what a reduction takes besides, and whether it does while activations are there.

    It does where gradients fill more than a bucket, or are reduced beside the backward; else once the backward is done.
    """
    learned = shape.num_learned
    if setup.plain:
        return (
            (0 if setup.dtype == "float32" else size * learned),
            0,
            False,
        )  # of the lane under way, not added yet
    if setup.stage == 0:
        return 0, 0, False
    numel = int(setup.zero.get("reduce_bucket_size", 500_000_000))
    flat = (
        size * min(numel, learned) if setup.world > 1 else 0
    )  # what is in the bucket, laid out for the collective
    # ZeRO-2 reduces each lane into a partition of its own, then adds it to that of the lanes before
    share = -(-learned // setup.world)
    touched = _touched(shape, setup.world) if setup.stage == 2 else share
    more = size * touched if setup.stage == 2 and setup.lanes > 1 else 0
    twice = setup.overlap and setup.stage < 3
    meanwhile = twice or (setup.stage > 1 and learned > numel)
    return size * (numel * (2 if twice else 1) + max(0, touched - share)), flat + more, meanwhile


def _touched(shape: ModelShape, world: int) -> int:
    """Return the elements of all weights that some part of the busiest worker's partition belongs to.

    ZeRO-2 keeps the gradient of a weight that lies across a border whole on both sides of it.
    """
    found = [0] * world
    for decays in (True, False):
        sizes = [
            weight.numel for weight in shape.weights if weight.learned and weight.decays is decays
        ]
        part, begin = max(1, -(-sum(sizes) // world)), 0
        for size in sizes:
            for owner in range(begin // part, (begin + size - 1) // part + 1):
                found[owner] += size
            begin += size
    return max(found)


def _at_update(shape: ModelShape, setup: Setup, size: int) -> int:
    """Return what the update holds besides the state."""
    if setup.stage == 0:
        return 0
    flat = 4 * -(-shape.num_learned // setup.world)
    if setup.stage < 3:
        return flat
    return min(flat, 4 * int(setup.zero.get("sub_group_size", SUB_GROUP))) + size * int(
        setup.zero.get("reduce_bucket_size", 500_000_000)
    )
