"""The labels of a run: those of the config, or those of the training data, found once and kept with the run.

With task.grow_head those of the model's head come first, and stay.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from dist_ft.config.schema import RunConfig, Source
from dist_ft.config.sections.task import LABELLED
from dist_ft.core.errors import ConfigError, DataError
from dist_ft.core.logs import redact
from dist_ft.core.world import Collectives, World, on_rank0
from dist_ft.data.encoding import task_rows
from dist_ft.data.sources import readers
from dist_ft.data.sources.discovery import discover_shards
from dist_ft.model.loading.grow_head import grown_labels, own_labels
from dist_ft.model.loading.download import fetch_model
from dist_ft.storage.filesystem import Store

KEPT = "data/labels.json"
MOST = 10_000


def with_labels(
    config: RunConfig, store: Store, world: World, collectives: Collectives
) -> RunConfig:
    """Return the config with the labels of its task filled in; a collective call.

    Raises:
        DataError: a row without a label (under data.bad_rows=error), or data with fewer than two labels.
        ConfigError: task.class_weights of another number of labels.
    """
    task = config.task
    if task.name not in LABELLED:
        return config
    spoken = config.prompting.verbalisers if config.prompting.method == "likelihood" else ()
    found = (
        task.labels
        or tuple(spoken)
        or tuple(on_rank0(world, collectives, lambda: _kept(config, store)))
    )
    if task.grow_head:
        own = own_labels(
            fetch_model(config.model.path, config.model.revision, config.data.cache_dir, weights=False),
            task,
        )
        found = grown_labels(own, found, named=bool(task.labels))
    if task.class_weights and len(task.class_weights) != len(found):
        raise ConfigError(
            [
                f"task.class_weights: {len(task.class_weights)} weights and {len(found)} labels "
                f"({', '.join(found[:8])}{', ...' if len(found) > 8 else ''}); one for each is needed, in "
                "this order; correct them"
            ]
        )
    return config.model_copy(update={"task": task.model_copy(update={"labels": tuple(found)})})


def _kept(config: RunConfig, store: Store) -> list[str]:
    """Return the labels the run began with; if it has not begun, find and keep them (rank 0 only)."""
    if store.exists(KEPT):
        return list(json.loads(store.read(KEPT)))
    found = find_labels(config, least=1 if config.task.grow_head else 2)
    store.write(KEPT, json.dumps(found, ensure_ascii=False).encode())
    return found


def find_labels(config: RunConfig, least: int = 2) -> list[str]:
    """Return the labels of the training data in the order of a head's outputs; reads every row once."""
    found = labels_in(config, config.data.train)
    if len(found) < least:
        raise DataError(
            f"data.train: its rows have {len(found)} label{'s' if len(found) != 1 else ''}"
            f"{' (' + min(found) + ')' if found else ''}; at least two are needed to choose among; set "
            "task.columns, or name them in task.labels"
        )
    return list(task_rows.sort_labels(found))


def labels_in(config: RunConfig, sources: Sequence[Source]) -> set[str]:
    """Return the labels that rows of `sources` have; reads every row once."""
    found: set[str] = set()
    for shard in (shard for source in discover_shards(sources) for shard in source):
        for number, row in enumerate(readers.iter_rows(shard), 1):
            try:
                if isinstance(row, DataError):
                    raise row
                found.update(task_rows.read_label_names(row, config.task, shard.url, number))
            except DataError:
                if config.data.bad_rows == "error":
                    raise
        if len(found) > MOST:
            raise DataError(
                redact(
                    f"{shard.url}: there are {len(found)} labels by now; at most {MOST} are "
                    "allowed; set task.columns.label to a column of labels, or, for numbers, "
                    "task.name=regression"
                )
            )
    return found
