"""Labels a trained classifier gives to rows that have none, where it is sure enough: pseudo-labels (Lee 2013).

What comes out is training data like any other, to be a further source of data.train. Guarantees: rows keep their order;
every row that is left out is counted by its reason; with a cap the surest rows of a label stay. One process.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from dist_ft.core.errors import DataError, ModelError
from dist_ft.data.sources.discovery import Row
from dist_ft.inference.predict import Predictor
from dist_ft.inference.prediction_file import CHUNK_ROWS

CONFIDENCE = "confidence"
"""Column that tells how sure the model was: its probability of the label."""


@dataclass(frozen=True)
class Pseudo:
    """Rows with their new labels, and what became of all rows.

    Attributes:
        rows: in their order; each has the label's column and `confidence` besides its own columns.
        kept: rows kept, by label; every label of the model is there.
        num_unsure, num_over, num_labelled: left out as the model was not sure, as their label has rows enough, as they
            have a label already.
    """

    rows: list[Row]
    kept: dict[str, int]
    num_unsure: int
    num_over: int
    num_labelled: int


def pseudo_label(
    predictor: Predictor, rows: Iterable[Row | DataError], confidence: float, most: int = 0
) -> Pseudo:
    """Return the rows the model gives a label with at least `confidence`, of each label at most `most` (0: all).

    Raises ModelError for a model that does not choose one label a text; DataError for a row without a text.
    """
    task = predictor.task
    if task.name != "sequence_classification":
        raise ModelError(
            f"a model of task {task.name} has no one label a text to be sure of; models of "
            "sequence_classification are allowed; give one that was trained with it"
        )
    chosen: dict[str, list[tuple[float, int, Row]]] = {label: [] for label in task.labels}
    left: Counter[str] = Counter()

    def take(number: int, row: Row, found: dict[str, Any]) -> None:
        sure = float(found["score"])
        if sure < confidence:
            left["unsure"] += 1
            return
        item = (sure, -number, {**row, task.columns.label: found["label"], CONFIDENCE: sure})
        held = chosen[found["label"]]
        if most and len(held) == most:
            heapq.heappushpop(held, item)  # numbers differ, so rows are never compared
            left["over"] += 1
        else:
            heapq.heappush(held, item)

    _each(predictor, _unlabelled(rows, task.columns.label, left), take)
    found = sorted((item for held in chosen.values() for item in held), key=lambda item: -item[1])
    return Pseudo(
        [row for _, _, row in found],
        {label: len(held) for label, held in chosen.items()},
        left["unsure"],
        left["over"],
        left["labelled"],
    )


def _unlabelled(rows: Iterable[Row | DataError], column: str, left: Counter[str]) -> Iterable[Row]:
    for row in rows:
        if isinstance(row, DataError):
            raise row
        if row.get(column) is not None:
            left["labelled"] += 1
        else:
            yield row


def _each(
    predictor: Predictor, rows: Iterable[Row], take: Callable[[int, Row, dict[str, Any]], None]
) -> None:
    stream, number = iter(rows), 0
    while chunk := list(islice(stream, CHUNK_ROWS)):
        for row, found in zip(chunk, predictor.predict(chunk), strict=True):
            take(number, row, found)
            number += 1


def describe(found: Pseudo, out: str) -> str:
    """Return the table of what was kept and left out."""
    from dist_ft.training.console import format_table

    labels: Sequence[tuple[str, int]] = sorted(found.kept.items(), key=lambda item: -item[1])
    return format_table(
        f"{len(found.rows):,} rows in {out}",
        [
            *((f"as {label}", f"{count:,}") for label, count in labels),
            ("left out: not sure enough", f"{found.num_unsure:,}"),
            ("left out: over --most", f"{found.num_over:,}"),
            ("left out: had a label", f"{found.num_labelled:,}"),
        ],
    )
