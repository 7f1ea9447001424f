"""Pseudo-labels (Lee 2013): a trained classifier labels rows where it is confident.

The result is training data like any other, to be a further source of data.train. Guarantees: rows
keep their order; every row that is left out is counted by its reason; with a limit the most
confident rows of a label are kept. One process.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

from dist_ft.core.errors import DataError, ModelError
from dist_ft.data.sources.discovery import Row
from dist_ft.inference.predict import Predictor
from dist_ft.inference.prediction_file import CHUNK_ROWS

CONFIDENCE = "confidence"
"""Column with the model's probability of the label."""


@dataclass(frozen=True)
class PseudoLabeledRows:
    """Rows with their new labels, and the counts of all rows.

    Attributes:
        rows: the labeled rows, in their order; each also has the column of the label and
            `confidence`.
        num_kept: rows that are kept, by label; all labels of the model are listed.
        num_unsure: rows left out because the model was not confident.
        num_over: rows left out because their label has enough rows.
        num_labeled: rows left out because they have a label.
    """

    rows: list[Row]
    num_kept: dict[str, int]
    num_unsure: int
    num_over: int
    num_labeled: int


class _Candidate(NamedTuple):
    """A row with its new label, ordered by confidence; of equally confident rows, later ones first.

    No two numbers are equal, so that the rows themselves, which cannot be ordered, are never
    compared.
    """

    confidence: float
    minus_number: int
    row: Row


def pseudo_label(
    predictor: Predictor,
    rows: Iterable[Row | DataError],
    confidence: float,
    max_per_label: int = 0,
) -> PseudoLabeledRows:
    """Return the rows to which the model gives a label with at least `confidence`.

    Args:
        predictor: a predictor whose model is a classifier.
        rows: rows with and without a label.
        confidence: least probability of the label.
        max_per_label: maximum number of rows to keep of each label; 0: all.

    Raises:
        ModelError: the model does not choose one label for a text.
        DataError: a row without a text.
    """
    task = predictor.task
    if not task.has_label_per_row:
        raise ModelError(
            f"a model of task {task.name} does not choose one label for a text. Models of "
            "sequence_classification are allowed. Give one that was trained with it."
        )

    # Every label has an entry from the start, so that one without a row is shown with 0.
    kept: dict[str, list[_Candidate]] = {label: [] for label in task.labels}
    left_out: Counter[str] = Counter()
    column = task.columns.label
    stream = _unlabeled(rows, column, left_out)
    number = 0

    # In chunks: the input may be larger than memory, and only rows that are kept stay there.
    while chunk := list(islice(stream, CHUNK_ROWS)):
        for row, prediction in zip(chunk, predictor.predict(chunk), strict=True):
            label, probability = prediction["label"], float(prediction["score"])
            number += 1
            if probability < confidence:
                left_out["unsure"] += 1
                continue

            labeled = {**row, column: label, CONFIDENCE: probability}
            candidate = _Candidate(probability, -number, labeled)
            heap = kept[label]

            # The least confident row of a label is at the top of its heap, and leaves it first.
            if max_per_label and len(heap) == max_per_label:
                heapq.heappushpop(heap, candidate)
                left_out["over"] += 1
            else:
                heapq.heappush(heap, candidate)

    candidates: list[_Candidate] = []
    num_kept = {}
    for label, heap in kept.items():
        candidates += heap
        num_kept[label] = len(heap)

    # Back to the order of the input: heaps are ordered by confidence.
    candidates.sort(key=lambda candidate: -candidate.minus_number)
    return PseudoLabeledRows(
        rows=[candidate.row for candidate in candidates],
        num_kept=num_kept,
        num_unsure=left_out["unsure"],
        num_over=left_out["over"],
        num_labeled=left_out["labeled"],
    )


def _unlabeled(
    rows: Iterable[Row | DataError], column: str, left_out: Counter[str]
) -> Iterator[Row]:
    """Yield the rows without a label; count the others."""
    for row in rows:
        if isinstance(row, DataError):
            raise row

        if row.get(column) is not None:
            left_out["labeled"] += 1
        else:
            yield row


def describe(result: PseudoLabeledRows, out: str) -> str:
    """Return the table of the rows that were kept and left out."""
    from dist_ft.training.console import format_table

    # Most frequent first; the sort is stable, so that equal counts keep the order of the labels.
    table = []
    for label, count in sorted(result.num_kept.items(), key=lambda item: -item[1]):
        table.append((f"as {label}", f"{count:,}"))

    table += [
        ("left out: not confident enough", f"{result.num_unsure:,}"),
        ("left out: over the limit per label", f"{result.num_over:,}"),
        ("left out: had a label", f"{result.num_labeled:,}"),
    ]
    return format_table(f"{len(result.rows):,} rows in {out}", table)
