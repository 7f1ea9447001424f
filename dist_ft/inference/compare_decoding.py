"""Ways to make texts beside each other: the same held-out prompts, what each costs and what its texts are worth."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from dist_ft.config.schema import RunConfig
from dist_ft.config.sections.decoding import parse, short_form
from dist_ft.core.errors import ConfigError
from dist_ft.core.world import Collectives, World
from dist_ft.inference.evaluate import of_model
from dist_ft.inference.model_under_test import Asked
from dist_ft.storage import filesystem
from dist_ft.training.held_out_generation import HeldOutGenerator


def compare(
    config: RunConfig, paths: Sequence[str], strategies: Sequence[str]
) -> list[dict[str, Any]]:
    """Return a row for each model and strategy, in this process.

    Args:
        config: whose evaluation section says which prompts, how long texts are, and which metrics.
        paths: of models.
        strategies: as `config.decoding.parse` reads them; none: that of evaluation.decoding.

    Returns:
        Mappings of model, strategy, the metrics, samples, seconds, tokens_per_s, and `texts`, the first of them.

    Raises:
        ConfigError: no texts are made by the config, or a strategy is none.
        ModelError: a model that is absent or makes no texts.
    """
    own = config.evaluation.decoding
    if not own.max_new_tokens:
        raise ConfigError(
            [
                "evaluation.decoding.max_new_tokens=0: texts have no length; a number above 0 is needed; "
                "set it"
            ],
            "decode",
        )
    sections = [parse(text, own) for text in strategies] or [own]
    filesystem.configure(config.storage.options)
    found = []
    for path in paths:
        asked = Asked(of_model(config, path))
        texts = HeldOutGenerator(asked.config, asked.tokenizer)
        with asked.reading(config.evaluation.data) as loader:
            for batches in loader.iterate(0, loader.steps_per_epoch, range(config.num_lanes)):
                for batch in batches:
                    texts.see(batch)
        samples = texts.gather(Collectives())
        for section in sections:
            begun = time.perf_counter()
            values, num_tokens = texts.told(
                samples, asked.engine, World(), Collectives(), section=section
            )
            seconds = time.perf_counter() - begun
            found.append(
                {
                    "model": path,
                    "strategy": short_form(section),
                    "samples": len(samples),
                    **{name: value for name, value in values.items() if name != "texts"},
                    "seconds": seconds,
                    "tokens_per_s": num_tokens / seconds,
                    "texts": values["texts"],
                }
            )
    return found
