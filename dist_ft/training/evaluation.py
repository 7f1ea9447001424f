"""Evaluation on held-out data; each sample counts once at every world size.

Dimensions: B rows of a batch; the other dimensions of a row's output are those of its task.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from dist_ft.config.sections.task import TaskSection
from dist_ft.core.json_documents import encode_json, interpreting
from dist_ft.core.world import Collectives, World
from dist_ft.data.batching.loader import Loader
from dist_ft.engine.base import Engine, pad_to_equal_lanes
from dist_ft.metrics.task_scores import LabelTable
from dist_ft.storage.documents import read_json_object
from dist_ft.storage.filesystem import Store
from dist_ft.tasks.base import make_task
from dist_ft.training.error_examples import ErrorExample
from dist_ft.training.held_out_generation import Generation, HeldOutGenerator
from dist_ft.training.prediction_collector import PredictionCollector

FOLDER = "evaluations"
STORED_EVALUATION = re.compile(r"step-([0-9]+)\.json")
"""Name of the file of an evaluation, with its step."""
CAUSAL_LM = TaskSection()
"""The task of a config that names none."""


@dataclass(frozen=True)
class EvaluationOutputs:
    """What an evaluation computes in addition to the loss.

    Attributes:
        task: task of the run; all tasks but causal_lm have metrics.
        collector: collects the predictions, for a caller who needs them; default: a new one.
        generator: generates text for held-out prompts; None: no text is generated.
    """

    task: TaskSection = CAUSAL_LM
    collector: PredictionCollector | None = None
    generator: HeldOutGenerator | None = None


LOSS_ONLY = EvaluationOutputs()


@dataclass(frozen=True)
class Evaluation:
    """The results of one evaluation.

    Attributes:
        metrics: loss, perplexity (of tasks that predict tokens), num_target_tokens, and the metrics
            of the task and of generated text.
        tables: tables of the task: metrics by label or tag, and the confusion matrix.
        examples: the most confident errors; None if the task has none.
        generations: the first generations; None if no text was generated.
    """

    metrics: dict[str, float]
    tables: dict[str, LabelTable | list[list[int]]] = field(default_factory=dict)
    examples: list[ErrorExample] | None = None
    generations: list[Generation] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return all results in one mapping, as it is stored and reported."""
        document: dict[str, Any] = {**self.metrics, **self.tables}
        if self.examples is not None:
            document["examples"] = self.examples
        if self.generations is not None:
            document["generations"] = self.generations
        return document


def evaluate(
    engine: Engine,
    loader: Loader,
    num_lanes: int,
    world: World,
    collectives: Collectives,
    outputs: EvaluationOutputs = LOSS_ONLY,
    on_progress: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Return the results of one pass over `loader`; a collective call.

    Lanes are dealt to workers as in training; a worker without a lane runs an empty batch of weight
    zero. `on_progress` is called for each batch.
    """
    task, generator = make_task(outputs.task), outputs.generator
    collector = None
    if not task.reads_formats:
        collector = outputs.collector or PredictionCollector(outputs.task)

    loss_sum, num_targets = 0.0, 0
    most_lanes = world.largest_share(num_lanes)
    for batches in loader.iterate(0, loader.steps_per_epoch, world.share(num_lanes)):
        # Under ZeRO-3 a forward pass is a collective call, so every worker makes the same number.
        # The seeds are not used: dropout is off.
        padded, _ = pad_to_equal_lanes(batches, [0] * len(batches), most_lanes)
        for batch in padded:
            on_progress()
            if collector is None:
                loss_sum += engine.loss_sum(batch)
            else:
                loss, predictions = engine.loss_and_outputs(batch)  # predictions: (B, ...)
                loss_sum += loss
                collector.add(batch, predictions)

            num_targets += batch.num_target_tokens

            # Prompts are only collected here. Text is generated after the loop, in batches that
            # hold samples of all workers.
            if generator is not None:
                generator.collect(batch)

    # Sums, not means: a worker with fewer target tokens weighs less.
    total, count = collectives.sum([loss_sum, num_targets])
    loss = total / max(1.0, count)
    metrics = {"loss": loss}
    if task.counts_tokens:
        metrics["perplexity"] = math.exp(min(loss, 700.0))  # a larger one would overflow

    metrics["num_target_tokens"] = count

    # All of the following are collective calls, and all workers make them in this order.
    tables, examples, generations = {}, None, None
    if collector is not None:
        scores = collector.compute_scores(collectives)
        metrics |= scores.values
        tables = scores.tables
        if task.describes_errors:
            tokenizer = loader.store.encoder.tokenizer
            examples = collector.collect_error_examples(collectives, tokenizer)

    if generator is not None:
        generated = generator.generate(engine, world, collectives, on_progress)
        metrics |= generated.metrics
        generations = generated.generations

    return Evaluation(metrics, tables, examples, generations)


def store_evaluation(store: Store, step: int, evaluation: Evaluation) -> None:
    """Store an evaluation with the run if it has more than metrics, which metrics.jsonl holds."""
    document = evaluation.to_json()
    if document.keys() != evaluation.metrics.keys():
        store.write(
            f"{FOLDER}/step-{step:09d}.json",
            encode_json(document, indent=1),
        )


def read_evaluation(store: Store, step: int) -> dict[str, Any]:
    """Return what `store_evaluation` stored for `step`; empty if nothing is stored.

    Keys of version 0.1.0 are renamed to those of today.

    Raises:
        StorageError: the file is damaged.
    """
    path = f"{FOLDER}/step-{step:09d}.json"
    if not store.exists(path):
        return {}

    document = read_json_object(store, path)
    if "texts" in document:
        document["generations"] = document.pop("texts")

    with interpreting(store.redacted_url(path)):
        for example in document.get("examples") or ():
            for old, new in (("wanted", "expected"), ("told", "predicted")):
                if old in example:
                    example[new] = example.pop(old)

    return document
