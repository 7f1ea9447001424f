"""Before the first step of a run with tuning.anchor.method=ewc: how much each weight matters for what is to be kept.

That is the diagonal of the empirical Fisher information (Kirkpatrick et al., arXiv:1612.00796), by target token: the
squared gradients of the micro-batches' summed losses over the number of their targets (exact where a micro-batch is one
sample; of more, gradients of different samples count as independent). One micro-batch at a time over all workers, so it
is the same in every world. It is state of the optimizer from then on, and a resumed run does not measure it again.
"""

from __future__ import annotations

from collections.abc import Callable

from dist_ft.config.schema import RunConfig
from dist_ft.core.errors import DataError
from dist_ft.core.world import Collectives, World
from dist_ft.data.batch import empty_batch
from dist_ft.data.batching.loader import Loader
from dist_ft.engine.base import Engine


def measure(
    config: RunConfig,
    engine: Engine,
    loader: Loader,
    world: World,
    collectives: Collectives,
    beat: Callable[[], None],
) -> None:
    """Fill in the engine's Fisher information from one pass of `loader`; a collective call."""
    num_targets = 0
    for step in range(loader.steps_per_epoch):
        for lane in range(config.num_lanes):
            beat()
            batch = (
                loader.batches(step, [lane])[0]
                if lane % world.num_ranks == world.rank
                else empty_batch()
            )
            engine.accumulate_fisher(batch)
            num_targets += batch.num_target_tokens
    (total,) = collectives.sum([num_targets])
    if not total:
        raise DataError(
            "tuning.anchor.data: there is nothing to learn in it, so nothing tells what is to be kept; "
            "rows with targets are needed; correct the data"
        )
    engine.scale_fisher(1 / total)
