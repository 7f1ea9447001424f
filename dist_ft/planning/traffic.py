"""Bytes that a worker sends in a step, and bytes of a checkpoint. Pure.

Source of the volumes: Rajbhandari et al., "ZeRO", arXiv:1910.02054, section 7. With psi elements in
the model, data parallelism and ZeRO-1 and 2 move 2 psi a step (reduce-scatter and all-gather, psi
each); ZeRO-3 moves 3 psi (the weights once more for the backward pass). A ring sends (N - 1) / N of
it from each worker. With several lanes a step, ZeRO-0 and 1 still reduce once; ZeRO-2 reduces, and
ZeRO-3 gathers and reduces, in every lane.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict

from dist_ft.planning.model_shape import ModelShape
from dist_ft.planning.worker_memory import WorkerSetup

_NUM_MOMENTS = {"adamw": 2, "sgd": 1, "adafactor": 0}


@dataclass(frozen=True)
class Traffic:
    """What one optimizer step moves.

    DeepSpeed reduces gradients of ZeRO-1 and 2 by all-reduce and lets each worker copy its part
    (`use_multi_rank_bucket_allreduce`): psi more than a reduce-scatter.

    Attributes:
        elements: moved elements by kind, as published.
        sent_bytes: what a worker sends of them.
        sent_by_deepspeed_bytes: what it sends with DeepSpeed 0.19.
    """

    elements: dict[str, int]
    sent_bytes: int
    sent_by_deepspeed_bytes: int


class CheckpointBytes(TypedDict):
    """Bytes of a checkpoint and of related files (JSON).

    Keys:
        checkpoint: float32 masters and optimizer state of the trainable parameters.
        per_worker: what each worker writes of it.
        frozen: other parameters, written once per run.
        exported_model: all parameters.
    """

    checkpoint: int
    per_worker: int
    frozen: int
    exported_model: int


def step_traffic(shape: ModelShape, setup: WorkerSetup) -> Traffic:
    """Return what one optimizer step moves.

    Weights that are not trained are gathered (ZeRO-3), never reduced.
    """
    num_trainable = shape.num_trainable
    lanes = setup.lanes
    if setup.stage < 3:
        # ZeRO-2 keeps no whole gradients to add further lanes to, so each lane is reduced by itself
        num_reductions = lanes if setup.stage == 2 else 1
        elements = {"gradients": num_trainable * num_reductions, "weights": num_trainable}
    else:
        # gathered twice in each lane: for the forward pass, and again for the backward pass
        num_gathered = 2 * shape.num_parameters * lanes
        elements = {"gradients": num_trainable * lanes, "weights": num_gathered}

    if setup.world == 1:
        elements = dict.fromkeys(elements, 0)

    published = sum(elements.values())
    by_deepspeed = published
    if setup.stage in (1, 2):
        by_deepspeed += elements["gradients"]

    # a ring sends (N - 1) / N of the bytes; multiplied first, so that only the last step rounds
    def sent_bytes(num_elements: int) -> int:
        return num_elements * _weight_bytes(setup) * (setup.world - 1) // setup.world

    return Traffic(elements, sent_bytes(published), sent_bytes(by_deepspeed))


def checkpoint_bytes(shape: ModelShape, setup: WorkerSetup) -> CheckpointBytes:
    """Return the bytes of a checkpoint; all but `per_worker` are the same for any world size."""
    num_moments = _NUM_MOMENTS[setup.optimizer] if setup.has_moments else 0
    float32_copies = 1 + num_moments + setup.num_weight_copies

    # the master weights, the optimizer's moments, and copies such as a moving average
    total = 4 * shape.num_trainable * float32_copies
    num_frozen = shape.num_parameters - shape.num_trainable

    return CheckpointBytes(
        checkpoint=total,
        per_worker=-(-total // setup.world),
        frozen=_weight_bytes(setup) * num_frozen,
        exported_model=_weight_bytes(setup) * shape.num_parameters,
    )


def _weight_bytes(setup: WorkerSetup) -> int:
    return 4 if setup.dtype == "float32" else 2
