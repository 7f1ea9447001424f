"""Loss on held-out data, each sample counted once at every world size."""

from __future__ import annotations

import math
from collections.abc import Callable

from dist_ft.data.loader import Loader
from dist_ft.engine.base import Engine, even_out
from dist_ft.world import Collectives, World


def evaluate(engine: Engine, loader: Loader, num_lanes: int, world: World, collectives: Collectives,
             beat: Callable[[], None] = lambda: None) -> dict[str, float]:
    """Return {loss, perplexity, num_target_tokens} over one pass of `loader`; a collective call.

    Lanes are dealt as in training; a worker without a lane runs an empty batch of weight zero. `beat` is called for
    each.
    """
    lanes = world.share(num_lanes)
    loss_sum, num_targets = 0.0, 0
    for batches in loader.iterate(0, loader.steps_of_a_pass, lanes):
        evened, _ = even_out(batches, [0] * len(batches), world.largest_share(num_lanes))
        for batch in evened:
            beat()
            loss_sum += engine.loss_sum(batch)
            num_targets += batch.num_target_tokens
    total, count = collectives.sum([loss_sum, num_targets])
    loss = total / max(1.0, count)
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "num_target_tokens": count}
