"""Examples of few-shot prompts: drawn from the training data once and kept with the run, so that every rank has the same."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

from dist_ft.config.schema import RunConfig
from dist_ft.core.errors import DataError
from dist_ft.core.world import Collectives, World, on_rank0
from dist_ft.data.encoding import prompt_templates, task_rows
from dist_ft.data.encoding.task_rows import Sample
from dist_ft.data.sources import readers
from dist_ft.data.sources.discovery import Row, discover_shards
from dist_ft.storage.filesystem import Store

if TYPE_CHECKING:
    pass

KEPT = "data/examples.json"


def with_examples(
    config: RunConfig, store: Store, world: World, collectives: Collectives
) -> RunConfig:
    """Return the config with its examples written into its templates; a collective call.

    The labels must be known. Raises DataError for a training row that can not be used (under data.bad_rows=error).
    """
    section = config.prompting
    if section.method != "likelihood" or not section.shots:
        return config
    templates = tuple(on_rank0(world, collectives, lambda: _kept(config, store)))
    return config.model_copy(
        update={"prompting": section.model_copy(update={"templates": templates, "shots": 0})}
    )


def _kept(config: RunConfig, store: Store) -> list[str]:
    """Return the templates the run began with; if it has not begun, make and keep them (rank 0 only)."""
    if store.exists(KEPT):
        return list(json.loads(store.read(KEPT)))
    section, labels = config.prompting, config.task.labels
    shown = examples(config, section.shots)
    found = [
        prompt_templates.prepend_examples(
            template,
            [prompt_templates.format_example(template, sample, labels, section) for sample in shown],
            section.separator,
        )
        for template in section.templates
    ]
    store.write(KEPT, json.dumps(found, ensure_ascii=False).encode())
    return found


def examples(config: RunConfig, count: int) -> list[Sample]:
    """Return `count` rows of the training data, of each label or in all, in an order drawn by prompting.seed."""
    ids = {label: number for number, label in enumerate(config.task.labels)}

    def samples() -> Iterator[tuple[int, Sample]]:
        for url, number, row in rows(config):
            try:
                sample = task_rows.READERS[config.task.name](row, config.task, ids, url, number)
            except DataError:
                if config.data.bad_rows == "error":
                    raise
                continue
            yield sample.label if by_label else 0, sample

    by_label = (
        config.prompting.shots_by == "label" and config.task.name == "sequence_classification"
    )
    found = prompt_templates.draw_per_class(samples(), count, config.prompting.seed)
    if not found:
        raise DataError(
            "data.train: has no row that prompting.shots could show; rows with a label are needed; set "
            "data.train, or prompting.shots=0"
        )
    return found


def rows(config: RunConfig) -> Iterator[tuple[str, int, Row]]:
    """Yield (shard, number, row) of the training data that could be decoded and are in scope."""
    outside, column = config.evaluation.robustness.out_of_scope_label, config.task.columns.label
    for shard in (shard for source in discover_shards(config.data.train) for shard in source):
        for number, row in enumerate(readers.iter_rows(shard), 1):
            if isinstance(row, DataError):
                if config.data.bad_rows == "error":
                    raise row
            elif outside is None or str(row.get(column)) != outside:
                yield shard.url, number, row
