"""The labels of a run: those of the config, or those found once in the training data.

Labels that are found are stored with the run.

With task.grow_head, the labels of the model's own head come first and keep their order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain

from dist_ft.checkpoint.stored_files import LABELS_FILE, read_labels
from dist_ft.config.resolved_run import ResolvedRun
from dist_ft.config.schema import RunConfig, Source
from dist_ft.config.task_facts import task_class
from dist_ft.core.errors import ConfigError, DataError
from dist_ft.core.json_documents import encode_json
from dist_ft.core.logs import redact
from dist_ft.core.world import Collectives, World, on_rank0
from dist_ft.data.encoding import task_rows
from dist_ft.data.encoding.data_task import data_task
from dist_ft.data.sources import readers
from dist_ft.data.sources.discovery import RowLocation, discover_shards
from dist_ft.model.loading.download import fetch_model
from dist_ft.model.loading.grow_head import grown_labels, own_labels
from dist_ft.storage.filesystem import Store

MAX_LABELS = 10_000
"""More different values than this are hardly labels: the column holds numbers or free text."""


def resolve_labels(
    run: ResolvedRun, store: Store, world: World, collectives: Collectives
) -> ResolvedRun:
    """Return the run with the labels of its task; a collective call.

    Raises:
        DataError: a row without a label (under data.bad_rows=error), or data with fewer than two
            labels.
        ConfigError: task.class_weights has another number of labels.
    """
    config, task = run.config, run.config.task
    if not task_class(task.name).has_labels:
        return run

    # In this order: named in the config, named by their words, found in the data.
    labels = run.labels
    if not labels and config.prompting.method == "likelihood":
        labels = tuple(config.prompting.verbalizers)
    if not labels:
        labels = on_rank0(world, collectives, lambda: _stored_labels(config, store))

    if task.grow_head:
        # Its config alone has the labels. Weights are fetched later (`resolve_grown_head`).
        model_folder = fetch_model(
            run.model.path, run.model.revision, config.data.cache_dir, weights=False
        )
        labels = grown_labels(own_labels(model_folder, task), labels, named=bool(task.labels))

    # Here and not with the config, because only now the number of labels is known.
    if task.class_weights and len(task.class_weights) != len(labels):
        shown = ", ".join(labels[:8])
        if len(labels) > 8:
            shown += ", ..."
        raise ConfigError(
            [
                f"task.class_weights: {len(task.class_weights)} weights and {len(labels)} labels "
                f"({shown}). Exactly one weight for each label is allowed, in this order. Correct "
                "task.class_weights."
            ]
        )
    return replace(run, labels=tuple(labels))


def _stored_labels(config: RunConfig, store: Store) -> tuple[str, ...]:
    """Return the labels the run started with.

    On its first start, find and store them (rank 0 only).
    """
    if store.exists(LABELS_FILE):
        return read_labels(store)

    # A head that grows has labels of its own, so that one label in the data is enough.
    minimum = 1 if config.task.grow_head else 2
    labels = _training_labels(config, minimum)

    # Their order is that of the head's outputs: later starts must not sort new data again.
    store.write(LABELS_FILE, encode_json(labels))
    return labels


def _training_labels(config: RunConfig, minimum: int) -> tuple[str, ...]:
    """Return the labels of the training data in the order of a head's outputs.

    Reads every row once.
    """
    labels = collect_labels(config, config.data.train)
    if len(labels) < minimum:
        noun = "label" if len(labels) == 1 else "labels"
        shown = f" ({min(labels)})" if labels else ""
        needed = "At least one label is needed."
        if minimum > 1:
            needed = "At least two different labels are needed."
        raise DataError(
            f"data.train: its rows have {len(labels)} {noun}{shown}. {needed} Set task.columns, or "
            "name the labels in task.labels."
        )

    return tuple(task_rows.sort_labels(labels))


def collect_labels(config: RunConfig, sources: Sequence[Source]) -> set[str]:
    """Return the labels of the rows of `sources`; reads every row once."""
    task = data_task(config.task)
    max_row_bytes = config.data.max_row_bytes
    labels = set[str]()

    for shard in chain.from_iterable(discover_shards(sources)):
        for number, row in enumerate(readers.iter_rows(shard, max_row_bytes=max_row_bytes), 1):
            try:
                if isinstance(row, DataError):
                    raise row
                labels.update(task.read_label_names(row, RowLocation(shard.url, number)))
            except DataError:
                if config.data.bad_rows == "error":
                    raise

        # After each shard, not at the end: a wrong column would fill memory with free text.
        if len(labels) > MAX_LABELS:
            raise DataError(
                redact(
                    f"{shard.url}: {len(labels)} different labels so far. At most {MAX_LABELS} "
                    "are allowed. Set task.columns.label to a column of labels, or "
                    "task.name=regression for numbers."
                )
            )
    return labels
