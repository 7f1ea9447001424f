"""The Fisher information of weights, before the first step of a run with tuning.anchor.method=ewc.

It says how much each weight matters for the anchor data. This is the diagonal of the empirical
Fisher information (Kirkpatrick et al., arXiv:1612.00796) per target token: the squared gradients of
the micro-batches' summed losses, divided by the number of target tokens. That is exact where a
micro-batch is one sample; with more, gradients of different samples count as independent. All
workers compute one micro-batch at a time, so the result is the same in every world. It is part of
the optimizer state from then on, and a resumed run does not measure it again.
"""

from __future__ import annotations

from collections.abc import Callable

from dist_ft.core.errors import DataError
from dist_ft.core.world import Collectives, World
from dist_ft.data.batch import empty_batch
from dist_ft.data.batching.loader import Loader
from dist_ft.engine.base import Engine


def measure_fisher_information(
    engine: Engine,
    loader: Loader,
    num_lanes: int,
    world: World,
    collectives: Collectives,
    on_progress: Callable[[], None],
) -> None:
    """Set the engine's Fisher information from one pass of `loader`; a collective call.

    Raises DataError if the data has no target token.
    """
    num_targets = 0  # of this rank

    for step in range(loader.steps_per_epoch):
        for lane in range(num_lanes):
            on_progress()

            # A pass is a collective call under ZeRO, so every rank makes every call. Ranks that do
            # not own the lane compute an empty micro-batch, which adds nothing to the gradient.
            is_own = lane % world.num_ranks == world.rank
            batch = loader.batches(step, [lane])[0] if is_own else empty_batch()

            engine.accumulate_fisher(batch)
            num_targets += batch.num_target_tokens

    # Over all ranks, so that either all raise or none does.
    (total,) = collectives.sum([num_targets])
    if not total:
        raise DataError(
            "tuning.anchor.data: has no target tokens, so the importance of weights cannot be "
            "measured. Rows with target tokens are needed. Correct the data."
        )
    engine.scale_fisher(1 / total)
