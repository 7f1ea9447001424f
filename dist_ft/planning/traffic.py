"""Bytes a worker sends in a step, and bytes of a checkpoint. Pure.

Source of the volumes: Rajbhandari et al., "ZeRO", arXiv:1910.02054, section 7: with as many elements as the model has
(psi), data parallelism and ZeRO-1 and 2 move 2 psi a step (reduce-scatter and all-gather, each psi), ZeRO-3 moves
3 psi (the weights once more for backward). A ring sends (N - 1) / N of it from each worker. With several lanes a step,
ZeRO-0 and 1 still reduce once; ZeRO-2 reduces and ZeRO-3 gathers and reduces in every lane.
"""

from __future__ import annotations

from dataclasses import dataclass

from dist_ft.planning.model_shape import ModelShape
from dist_ft.planning.worker_memory import Setup


@dataclass(frozen=True)
class Traffic:
    """Elements moved a step by kind, as published, and bytes a worker sends of them; and those of DeepSpeed 0.19.

    DeepSpeed reduces gradients of ZeRO-1 and 2 by all-reduce and lets each worker copy its part
    (`use_multi_rank_bucket_allreduce`): psi more than a reduce-scatter would be.
    """

    elements: dict[str, int]
    sent_bytes: int
    sent_by_deepspeed_bytes: int


def of_step(shape: ModelShape, setup: Setup) -> Traffic:
    """Return what one optimizer step moves; weights that do not learn are gathered (ZeRO-3), never reduced."""
    learned, every, lanes = shape.num_learned, shape.num_parameters, setup.lanes
    if setup.stage < 3:
        times = lanes if setup.stage == 2 else 1
        elements = {"gradients": learned * times, "weights": learned}
    else:
        elements = {"gradients": learned * lanes, "weights": 2 * every * lanes}
    if setup.world == 1:
        elements = dict.fromkeys(elements, 0)
    size = 4 if setup.dtype == "float32" else 2
    published = sum(elements.values())
    really = published + (elements["gradients"] if setup.stage in (1, 2) else 0)
    return Traffic(
        elements,
        *(number * size * (setup.world - 1) // setup.world for number in (published, really)),
    )


def checkpoint_bytes(shape: ModelShape, setup: Setup) -> dict[str, int]:
    """Return bytes of a checkpoint (float32 masters and state of what learns), and of what is written once or exported.

    The number of workers changes none of it; each writes its share.
    """
    learned, frozen = shape.num_learned, shape.num_parameters - shape.num_learned
    moments = {"adamw": 2, "sgd": 1, "adafactor": 0}[setup.optimizer] if setup.has_moments else 0
    size = 4 if setup.dtype == "float32" else 2
    whole = 4 * learned * (1 + moments + setup.guards)
    return {
        "checkpoint": whole,
        "a worker's part": -(-whole // setup.world),
        "frozen, once a run": size * frozen,
        "exported model": size * shape.num_parameters,
    }
