"""Examples in few-shot prompts, drawn from the training data once and stored with the run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import chain

from dist_ft.checkpoint.stored_files import TEMPLATES_FILE, read_templates
from dist_ft.config.resolved_run import ResolvedRun
from dist_ft.config.schema import RunConfig
from dist_ft.core.errors import DataError
from dist_ft.core.json_documents import encode_json
from dist_ft.core.world import Collectives, World, on_rank0
from dist_ft.data.encoding import prompt_templates
from dist_ft.data.encoding.task_rows import Sample
from dist_ft.data.sources import readers
from dist_ft.data.sources.discovery import Row, RowLocation, discover_shards
from dist_ft.storage.filesystem import Store
from dist_ft.tasks.base import make_task


def resolve_templates(
    run: ResolvedRun, store: Store, world: World, collectives: Collectives
) -> ResolvedRun:
    """Return the run with its examples written into its templates; a collective call.

    Its labels must be resolved. Raises DataError for a training row that cannot be used (under
    data.bad_rows=error).
    """
    section = run.config.prompting
    if section.method != "likelihood" or not section.shots:
        return run

    # On rank 0 alone, because a draw reads all of the training data.
    templates = on_rank0(world, collectives, lambda: _stored_templates(run, store))
    return replace(run, templates=templates)


def _stored_templates(run: ResolvedRun, store: Store) -> tuple[str, ...]:
    """Return the templates the run started with.

    On its first start, write and store them (rank 0 only).
    """
    if store.exists(TEMPLATES_FILE):
        return read_templates(store)

    section = run.config.prompting
    samples = draw_examples(run, section.shots)
    templates = []
    for template in section.templates:
        examples = [
            prompt_templates.format_example(template, sample, run.labels, section)
            for sample in samples
        ]
        templates.append(prompt_templates.prepend_examples(template, examples, section.separator))

    # The finished templates, not the rows: no later start reads the training data for them.
    store.write(TEMPLATES_FILE, encode_json(templates))
    return tuple(templates)


def draw_examples(run: ResolvedRun, count: int) -> list[Sample]:
    """Return `count` training samples, per label or in total, in an order by prompting.seed."""
    config, task = run.config, make_task(run.task)
    per_label = config.prompting.shots_by == "label" and task.has_label_per_row

    def samples() -> Iterator[tuple[int, Sample]]:
        """Yield (class, sample); without classes all samples are of class 0."""
        for location, row in _training_rows(config):
            try:
                sample = task.read(row, location)
            except DataError:
                if config.data.bad_rows == "error":
                    raise
                continue

            group = sample.label if per_label else 0
            yield group, sample

    # The generator is consumed here, row by row: memory is that of the drawn samples.
    drawn = prompt_templates.draw_per_class(samples(), count, config.prompting.seed)
    if not drawn:
        raise DataError(
            "data.train: has no row that prompting.shots could show. Rows with a label are "
            "needed. Set data.train, or prompting.shots=0."
        )
    return drawn


def _training_rows(config: RunConfig) -> Iterator[tuple[RowLocation, Row]]:
    """Yield (location, row) of the training data that can be decoded and is in scope."""
    out_of_scope = config.evaluation.robustness.out_of_scope_label
    column = config.task.columns.label

    iter_rows = partial(readers.iter_rows, max_row_bytes=config.data.max_row_bytes)
    for shard in chain.from_iterable(discover_shards(config.data.train)):
        for number, row in enumerate(iter_rows(shard), 1):
            # A reader yields the error of a row, so that it can continue with the next row.
            if isinstance(row, DataError):
                if config.data.bad_rows == "error":
                    raise row
            elif out_of_scope is None or str(row.get(column)) != out_of_scope:
                yield RowLocation(shard.url, number), row
