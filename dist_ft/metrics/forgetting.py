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

    # Scores above the diagonal are of stages that the model was not trained on yet: they may be
    # missing, and count for nothing here.
    lower_triangle: list[list[float | None]] = []
    for i, row in enumerate(matrix):
        lower_triangle.append([row[j] for j in range(i + 1)])

    # With this sign, more is better for every metric.
    sign = 1.0
    if metric in LOWER_IS_BETTER:
        sign = -1.0

    scores: list[list[float]] = []
    for lower_row in lower_triangle:
        signed_row = [sign * value for value in lower_row if value is not None]
        if len(signed_row) < len(lower_row):
            return None
        scores.append(signed_row)

    # The average is reported as the metric itself, so the sign is undone.
    last = len(matrix) - 1
    final = scores[last]
    average = sign * sum(final) / len(matrix)
    if last == 0:
        return ForgettingScores(average, None, None)

    # Only earlier stages can be forgotten: the last one was just trained.
    gains: list[float] = []
    losses: list[float] = []
    for j in range(last):
        scores_of_stage = [scores[i][j] for i in range(j, last)]  # after stages j .. last - 1
        gains.append(final[j] - scores_of_stage[0])
        losses.append(max(scores_of_stage) - final[j])

    return ForgettingScores(average, sum(gains) / last, sum(losses) / last)
