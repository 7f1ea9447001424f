"""A model asked again: about rows out of scope, with typos, with names swapped; numbers beside its metrics.

Rows are written anew into a folder that is gone afterwards, and asked about in the same way as the others.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from dist_ft.config.schema import RunConfig, Source
from dist_ft.config.sections.task import METRICS
from dist_ft.core.errors import ConfigError, DataError
from dist_ft.data.sources import readers
from dist_ft.data.sources.discovery import Row, discover_shards
from dist_ft.data.tools import perturb
from dist_ft.metrics.robustness import out_of_scope_auroc, share_of_changed_predictions


def scored(asked: Any, config: RunConfig) -> dict[str, Any]:
    """Return the metrics of held-out rows in scope, and what evaluation.robustness asks for besides.

    Args:
        asked: `asking.Asked` or `entities.Written`.
        config: whose evaluation.data are asked about.
    """
    section, task = config.evaluation.robustness, config.task
    label = section.out_of_scope_label
    if (
        label is None
        and not section.out_of_scope
        and not section.typo_rate
        and section.swaps is None
    ):
        return dict(asked.about(config.evaluation.data).values)
    every = list(_rows(config, config.evaluation.data))
    rows = [row for row in every if label is None or str(row.get(task.columns.label)) != label]
    with _folder() as folder:
        clean = asked.about(_written(folder, "clean", rows))
        values = dict(clean.values)
        if label is not None or section.out_of_scope:
            outside = [
                row
                for row in every
                if label is not None and str(row.get(task.columns.label)) == label
            ]
            outside += _rows(config, section.out_of_scope)
            if not outside or not rows:
                raise ConfigError(
                    [
                        f"evaluation.robustness.out_of_scope_label={label}: there are {len(outside)} rows "
                        f"out of scope and {len(rows)} in it; both are needed; correct it"
                    ],
                    "evaluate",
                )
            placeholder = {
                task.columns.label: asked.config.task.labels[0]
            }  # which label makes no difference
            found = asked.about(
                _written(folder, "outside", [{**row, **placeholder} for row in outside])
            )
            values |= {
                "out_of_scope_auroc": out_of_scope_auroc(clean.told, found.told),
                "out_of_scope_rows": len(found.told),
            }
        if section.typo_rate:
            noisy = [
                perturb.perturb_row(row, task, perturb.make_typo_function(section.typo_rate, section.seed, number))
                for number, row in enumerate(rows)
            ]
            found = asked.about(_written(folder, "typos", noisy))
            values |= {
                f"{name}_typos": found.values[name]
                for name in METRICS[task.name]
                if name in found.values
            }
        if section.swaps is not None:
            values |= _swapped(asked, config, rows, folder)
    return values


def _swapped(asked: Any, config: RunConfig, rows: list[Row], folder: Path) -> dict[str, Any]:
    """Return how predictions change where names are swapped: the counterfactual gap, over rows that hold some."""
    task, swap = config.task, perturb.make_swap_function(_pairs(config))
    pairs = [
        (row, other)
        for row, other in ((row, perturb.perturb_row(row, task, swap)) for row in rows)
        if other != row
    ]
    if not pairs:
        return {"counterfactual_rows": 0}
    before = asked.about(_written(folder, "before", [row for row, _ in pairs]))
    after = asked.about(_written(folder, "after", [row for _, row in pairs]))
    metric = METRICS[task.name][0]
    return {
        "counterfactual_rows": len(pairs),
        "counterfactual_changed": share_of_changed_predictions(task.name, before.told, after.told),
        "counterfactual_gap": abs(before.values[metric] - after.values[metric]),
    }


def _pairs(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Yield the terms of evaluation.robustness.swaps that belong together."""
    path = str(config.evaluation.robustness.swaps)
    for number, row in enumerate(
        _rows(config, (Source(path=path),), "evaluation.robustness.swaps"), 1
    ):
        first, second = row.get("first"), row.get("second")
        if not (
            isinstance(first, str) and isinstance(second, str) and first.strip() and second.strip()
        ):
            raise DataError(
                f"{path} row {number}: has no two terms; the columns first and second are needed; repair "
                "it"
            )
        yield first, second


def _rows(
    config: RunConfig, sources: Iterable[Source], field: str = "evaluation.data"
) -> Iterator[Row]:
    """Yield the rows of sources, the first evaluation.max_samples if these are held-out data."""
    most = config.evaluation.max_samples if field == "evaluation.data" else 0
    shards = [shard for found in discover_shards(list(sources), field) for shard in found]
    for row in islice((row for shard in shards for row in readers.iter_rows(shard)), most or None):
        if not isinstance(row, DataError):
            yield row
        elif config.data.bad_rows == "error":
            raise row


@contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="dist_ft-") as folder:
        yield Path(folder)


def _written(folder: Path, name: str, rows: Iterable[Row]) -> tuple[Source, ...]:
    """Write rows as a shard and return the source it is."""
    path = folder / f"{name}.jsonl"
    path.write_text(
        "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows), "utf-8"
    )
    return (Source(path=str(path)),)
