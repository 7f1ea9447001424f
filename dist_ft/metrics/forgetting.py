"""How much a model that learns one stage after the other keeps: average, backward transfer, forgetting. Pure.

From a matrix of scores, row i after stage i, column j on the held-out data of stage j. Forgetting and average accuracy
are those of Chaudhry et al. (arXiv:1801.10112), backward transfer that of Lopez-Paz and Ranzato (arXiv:1706.08840).
Metrics that are better when lower count negative in differences: below 0 backward transfer is a loss for any metric,
above 0 forgetting is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dist_ft.metrics.best import LOWER

Matrix = Sequence[Sequence[float | None]]
"""Scores (stages done, stages); None where the model can not be scored: its head has not those labels."""


@dataclass(frozen=True)
class Kept:
    """What the last row of a matrix tells of stages before.

    Attributes:
        average: mean score of the stages learned so far, after the last of them.
        backward_transfer: mean over earlier stages of the score now less that just after learning it; None with one.
        forgetting: mean over earlier stages of the best score before the last stage less that now; None with one.
    """

    average: float
    backward_transfer: float | None
    forgetting: float | None


def kept(matrix: Matrix, metric: str) -> Kept | None:
    """Return what is kept after the last of the rows; None if a score on or below the diagonal is missing.

    Raises ValueError without a row.
    """
    if not matrix:
        raise ValueError("a matrix of no stages")
    last = len(matrix) - 1
    rows = [[row[j] for j in range(i + 1)] for i, row in enumerate(matrix)]
    if any(value is None for row in rows for value in row):
        return None
    sign = -1.0 if metric in LOWER else 1.0
    scores = [[sign * value for value in row if value is not None] for row in rows]
    average = sign * sum(scores[last]) / len(matrix)
    if not last:
        return Kept(average, None, None)
    transfer = sum(scores[last][j] - scores[j][j] for j in range(last)) / last
    forgot = (
        sum(max(scores[i][j] for i in range(j, last)) - scores[last][j] for j in range(last)) / last
    )
    return Kept(average, transfer, forgot)
