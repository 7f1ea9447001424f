"""Loss on held-out data, each sample counted once at every world size."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

from dist_ft.config.sections.task import TaskSection
from dist_ft.core.world import Collectives, World
from dist_ft.data.batching.loader import Loader
from dist_ft.engine.base import Engine, pad_to_equal_lanes
from dist_ft.storage.filesystem import Store
from dist_ft.training.error_examples import DESCRIBERS
from dist_ft.training.held_out_generation import HeldOutTexts
from dist_ft.training.prediction_collector import Scorer

FOLDER = "evaluations"
CAUSAL_LM = TaskSection()
TELLS_TOKENS = ("causal_lm", "masked_lm", "seq2seq")


def evaluate(
    engine: Engine,
    loader: Loader,
    num_lanes: int,
    world: World,
    collectives: Collectives,
    beat: Callable[[], None] = lambda: None,
    task: TaskSection = CAUSAL_LM,
    scorer: Scorer | None = None,
    texts: HeldOutTexts | None = None,
) -> dict[str, Any]:
    """Return {loss, perplexity, num_target_tokens, metrics of the task} over one pass of `loader`; a collective call.

    Perplexity is that of tasks that tell tokens. Tables of a metric by label are mappings among the values;
    `examples` is what was most wrong (`examples.described`).

    Lanes are dealt as in training; a worker without a lane runs an empty batch of weight zero. `beat` is called for
    each. `scorer`: takes what is told, for a caller who wants more than metrics. With `texts`, some are made then, and
    their metrics and the first of them are among the values.
    """
    lanes = world.share(num_lanes)
    loss_sum, num_targets = 0.0, 0
    scorer = (scorer or Scorer(task)) if task.name != "causal_lm" else None
    for batches in loader.iterate(0, loader.steps_per_epoch, lanes):
        evened, _ = pad_to_equal_lanes(batches, [0] * len(batches), world.largest_share(num_lanes))
        for batch in evened:
            beat()
            if scorer is None:
                loss_sum += engine.loss_sum(batch)
            else:
                loss, told = engine.loss_and_outputs(batch)
                loss_sum += loss
                scorer.add(batch, told)
            num_targets += batch.num_target_tokens
            if texts is not None:
                texts.see(batch)
    total, count = collectives.sum([loss_sum, num_targets])
    loss = total / max(1.0, count)
    values: dict[str, Any] = {"loss": loss}
    if task.name in TELLS_TOKENS:
        values["perplexity"] = math.exp(min(loss, 700.0))
    values["num_target_tokens"] = count
    if scorer is not None:
        values |= scorer.scores(collectives)
        if task.name in DESCRIBERS:
            values["examples"] = scorer.examples(collectives, loader.store.encoder.tokenizer)
    if texts is not None:
        values |= texts.scores(engine, world, collectives, beat)
    return values


def keep_evaluation(store: Store, step: int, values: dict[str, Any]) -> None:
    """Keep all of an evaluation with the run, tables by label too, if it has any."""
    if any(not isinstance(value, float | int) for value in values.values()):
        store.write(
            f"{FOLDER}/step-{step:09d}.json",
            json.dumps(values, indent=1, ensure_ascii=False).encode(),
        )
