"""Forgetting of a model that is trained in stages. Pure.

The input is a matrix of scores: row i after stage i, column j on the held-out data of stage j.
Forgetting and average accuracy are those of Chaudhry et al. (arXiv:1801.10112), backward transfer
that of Lopez-Paz and Ranzato (arXiv:1706.08840). Metrics that are better when lower count negative
in differences: for every metric, a backward transfer below 0 and a forgetting above 0 mean that the
model got worse.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dist_ft.metrics.best import LOWER_IS_BETTER

Matrix = Sequence[Sequence[float | None]]
"""Scores (stages done, stages).

None where the model cannot be scored: its head lacks the labels of that stage.
"""


@dataclass(frozen=True)
class ForgettingScores:
    """Scores of the earlier stages after the last one.

    Attributes:
        average: mean score over the stages trained so far, after the last of them.
        backward_transfer: mean over earlier stages of the final score minus the score right after
            that stage; None with one stage.
        forgetting: mean over earlier stages of the best score before the last stage minus the final
            score; None with one stage.
    """

    average: float
    backward_transfer: float | None
    forgetting: float | None


def measure_forgetting(matrix: Matrix, metric: str) -> ForgettingScores | None:
    """Return the scores after the last row; None if a score on or below the diagonal is missing.

    Raises:
        ValueError: the matrix has no row.
    """
    if not matrix:
        raise ValueError("a matrix of no stages")

    last = len(matrix) - 1
    lower_triangle = [[row[j] for j in range(i + 1)] for i, row in enumerate(matrix)]
    if any(value is None for row in lower_triangle for value in row):
        return None

    sign = -1.0 if metric in LOWER_IS_BETTER else 1.0
    scores = [[sign * value for value in row if value is not None] for row in lower_triangle]
    final = scores[last]
    average = sign * sum(final) / len(matrix)
    if last == 0:
        return ForgettingScores(average, None, None)

    transfer = sum(final[j] - scores[j][j] for j in range(last)) / last
    best_before = [max(scores[i][j] for i in range(j, last)) for j in range(last)]
    forgetting = sum(best_before[j] - final[j] for j in range(last)) / last
    return ForgettingScores(average, transfer, forgetting)
