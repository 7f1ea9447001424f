"""Decoding strategies side by side on the same held-out prompts: cost and metrics of each."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from dist_ft.config.schema import RunConfig
from dist_ft.config.sections.decoding import format_strategy, parse_strategy
from dist_ft.core.errors import ConfigError
from dist_ft.core.world import Collectives, World
from dist_ft.inference.evaluation_run import derive_evaluation_run
from dist_ft.inference.model_under_test import ForwardModel
from dist_ft.storage import filesystem
from dist_ft.training.held_out_generation import HeldOutGenerator


def compare(
    config: RunConfig, paths: Sequence[str], strategies: Sequence[str]
) -> list[dict[str, Any]]:
    """Return a row for each model and strategy, in this process.

    Args:
        config: its evaluation section sets the prompts, the length of generations, and the metrics.
        paths: paths of the models.
        strategies: decoding strategies (`config.sections.decoding.parse_strategy`). Default: that
            of evaluation.decoding.

    Returns:
        Mappings of model, strategy, the metrics, samples, seconds, tokens_per_s, and the first
        `generations`.

    Raises:
        ConfigError: the config generates nothing, or a strategy does not exist.
        ModelError: a model that does not exist or cannot generate text.
    """
    own = config.evaluation.decoding
    if not own.max_new_tokens:
        raise ConfigError(
            [
                "evaluation.decoding.max_new_tokens=0: nothing is generated. A number above 0 is "
                "needed. Set it."
            ],
            "decode",
        )

    # Parsed before a model is loaded, so that a misspelled strategy is an error at once.
    sections = [parse_strategy(text, own) for text in strategies] or [own]
    filesystem.configure(config.storage.options)

    rows = []
    for path in paths:
        model = ForwardModel(derive_evaluation_run(config, path))

        # The prompts are collected once per model: all strategies get the same ones, and none is
        # charged for reading the data.
        generator = HeldOutGenerator(model.run.config, model.run.tokenizer)
        with model.open_loader(config.evaluation.data) as loader:
            for batches in loader.iterate(0, loader.steps_per_epoch, range(config.num_lanes)):
                for batch in batches:
                    generator.collect(batch)
        samples = generator.take_samples(Collectives())

        for section in sections:
            start_s = time.perf_counter()
            generated = generator.generate_for(
                samples, model.engine, World(), Collectives(), decoding=section
            )
            seconds = time.perf_counter() - start_s

            rows.append(
                {
                    "model": path,
                    "strategy": format_strategy(section),
                    "samples": len(samples),
                    **generated.metrics,
                    "seconds": seconds,
                    "tokens_per_s": generated.num_tokens / seconds,
                    "generations": generated.generations,
                }
            )

    return rows
