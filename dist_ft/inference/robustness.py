"""Robustness scores of a model, in addition to its metrics on clean rows.

They are computed on out-of-scope rows, on rows with typos and on rows with names swapped. All these
rows are written into a temporary folder and scored like any other data.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from dist_ft.config.schema import RunConfig, Source
from dist_ft.core import scratch
from dist_ft.core.errors import ConfigError, DataError
from dist_ft.core.json_documents import encode_json
from dist_ft.data.sources import readers
from dist_ft.data.sources.discovery import Row, discover_shards
from dist_ft.data.tools import perturb
from dist_ft.inference.model_under_test import ModelScores, ModelUnderTest
from dist_ft.metrics.robustness import out_of_scope_auroc, share_of_changed_predictions
from dist_ft.tasks.base import make_task


def score_with_robustness(model: ModelUnderTest) -> dict[str, Any]:
    """Return the metrics on in-scope held-out rows, and the scores of evaluation.robustness.

    Raises:
        ConfigError: a score of out-of-scope rows is requested, but all rows are in scope, or none.
        DataError: a row cannot be read, or evaluation.robustness.swaps is not usable.
    """
    config = model.run.config
    section, task = config.evaluation.robustness, make_task(config.task)
    label = section.out_of_scope_label
    has_out_of_scope = label is not None or bool(section.out_of_scope)
    if not has_out_of_scope and not section.typo_rate and section.swaps is None:
        return dict(model.score(config.evaluation.data).metrics)

    # The metrics leave out-of-scope rows out, because the model has no label for them.
    in_scope: list[Row] = []
    out_of_scope: list[Row] = []
    for row in _rows(config, config.evaluation.data):
        is_out_of_scope = label is not None and str(row.get(task.columns.label)) == label
        if is_out_of_scope:
            out_of_scope.append(row)
        else:
            in_scope.append(row)

    if has_out_of_scope:
        out_of_scope += _rows(config, section.out_of_scope)

    with _temporary_folder() as folder:
        clean = model.score(_write_source(folder, "clean", in_scope))
        scores = dict(clean.metrics)
        if has_out_of_scope:
            scores |= _score_out_of_scope(model, clean, in_scope, out_of_scope, folder)
        if section.typo_rate:
            scores |= _score_typos(model, in_scope, folder)
        if section.swaps is not None:
            scores |= _score_swaps(model, in_scope, folder)

    return scores


def _score_out_of_scope(
    model: ModelUnderTest,
    clean: ModelScores,
    in_scope: list[Row],
    out_of_scope: list[Row],
    folder: Path,
) -> dict[str, float]:
    """Return the AUROC with which the model's confidence separates out-of-scope from other rows.

    Args:
        model: the model.
        clean: its scores on `in_scope`.
        in_scope: rows with a label of the task.
        out_of_scope: all other rows.
        folder: temporary folder for data.
    """
    config = model.run.config
    if not out_of_scope or not in_scope:
        label = config.evaluation.robustness.out_of_scope_label
        raise ConfigError(
            [
                f"evaluation.robustness.out_of_scope_label={label}: {len(out_of_scope)} rows are "
                f"out of scope and {len(in_scope)} rows are in scope. Both are needed. Correct "
                "the label or the data."
            ],
            "evaluate",
        )

    # A row is read only with a known label. Any will do, because only the confidence is used.
    placeholder = {config.task.columns.label: model.run.labels[0]}
    rows = [{**row, **placeholder} for row in out_of_scope]
    scores = model.score(_write_source(folder, "outside", rows))
    return {
        "out_of_scope_auroc": out_of_scope_auroc(clean.predicted, scores.predicted),
        "out_of_scope_rows": len(scores.predicted),
    }


def _score_typos(model: ModelUnderTest, rows: list[Row], folder: Path) -> dict[str, float]:
    """Return the task's metrics on `rows` with typos, as `<metric>_typos`."""
    config = model.run.config
    section, task = config.evaluation.robustness, make_task(config.task)
    noisy = []
    for number, row in enumerate(rows):
        # A function per row, so that its typos do not depend on the rows before it.
        add_typos = perturb.make_typo_function(section.typo_rate, section.seed, number)
        noisy.append(perturb.perturb_row(row, task.text_columns(), add_typos))

    metrics = model.score(_write_source(folder, "typos", noisy)).metrics
    scores = {}
    for name in task.metrics:
        if name in metrics:
            scores[f"{name}_typos"] = metrics[name]

    return scores


def _score_swaps(model: ModelUnderTest, rows: list[Row], folder: Path) -> dict[str, float]:
    """Return how predictions change when names are swapped, over the rows with such names.

    counterfactual_changed is the fraction of predictions that change, and counterfactual_gap the
    absolute difference of the task's first metric.
    """
    config = model.run.config
    task = make_task(config.task)
    swap = perturb.make_swap_function(_swap_pairs(config))

    # Rows without such a name are left out: their predictions cannot change, so that they would
    # only lower the fraction.
    original, swapped = [], []
    for row in rows:
        changed = perturb.perturb_row(row, task.text_columns(), swap)
        if changed != row:
            original.append(row)
            swapped.append(changed)

    if not original:
        return {"counterfactual_rows": 0}

    before = model.score(_write_source(folder, "before", original))
    after = model.score(_write_source(folder, "after", swapped))

    # Decisions are compared, not logits: any change of a text changes its logits a little.
    share = share_of_changed_predictions(
        [task.decide(predicted) for predicted in before.predicted],
        [task.decide(predicted) for predicted in after.predicted],
    )
    metric = task.metrics[0]
    return {
        "counterfactual_rows": len(original),
        "counterfactual_changed": share,
        "counterfactual_gap": abs(before.metrics[metric] - after.metrics[metric]),
    }


def _swap_pairs(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Yield the pairs of terms in evaluation.robustness.swaps.

    Raises:
        DataError: a row does not have two terms.
    """
    path = str(config.evaluation.robustness.swaps)
    rows = _rows(config, (Source(path=path),), "evaluation.robustness.swaps")
    for number, row in enumerate(rows, 1):
        first, second = row.get("first"), row.get("second")
        if not _is_term(first) or not _is_term(second):
            raise DataError(
                f"{path} row {number}: does not have two terms. The columns first and second are "
                "needed. Repair the row."
            )
        yield str(first), str(second)


def _is_term(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _rows(
    config: RunConfig, sources: Iterable[Source], field: str = "evaluation.data"
) -> Iterator[Row]:
    """Yield the rows of `sources`; of held-out data the first evaluation.max_samples.

    Bad rows are skipped, or raised as DataError if data.bad_rows is error.
    """
    # The limit is for samples: a file of swaps is read as a whole.
    limit = 0
    if field == "evaluation.data":
        limit = config.evaluation.max_samples

    shards = chain.from_iterable(discover_shards(list(sources), field))
    iter_rows = partial(readers.iter_rows, max_row_bytes=config.data.max_row_bytes)
    rows = chain.from_iterable(map(iter_rows, shards))
    for row in islice(rows, limit or None):
        if not isinstance(row, DataError):
            yield row
        elif config.data.bad_rows == "error":
            raise row


@contextmanager
def _temporary_folder() -> Iterator[Path]:
    with scratch.folder("robustness") as folder:
        yield folder


def _write_source(folder: Path, name: str, rows: Iterable[Row]) -> tuple[Source, ...]:
    """Write `rows` as a shard and return it as a config section has its sources."""
    path = folder / f"{name}.jsonl"

    # Rows of Parquet files may hold values that JSON lacks, such as dates: these become text.
    path.write_bytes(b"".join(encode_json(row) + b"\n" for row in rows))
    return (Source(path=str(path)),)
