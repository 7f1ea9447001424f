"""Compares evaluations by any metric, whether it is better when higher or when lower. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

LOWER_IS_BETTER = ("loss", "perplexity", "mse", "mae", "calibration_error", "token_error_rate")
"""Metrics that are better when lower; all others are better when higher."""


class EvaluationPoint(NamedTuple):
    """The value of one metric at the evaluation after `step` steps."""

    step: int
    value: float


def sort_key(metric: str, value: float) -> float:
    """Return a number that is lower the better `value` is.

    Infinity for a value that is not finite.
    """
    # NaN compares as false with every number: `min` would depend on the order of the values.
    if not math.isfinite(value):
        return math.inf

    if metric in LOWER_IS_BETTER:
        return value
    return -value


def find_best(metric: str, history: Sequence[tuple[int, float]]) -> EvaluationPoint:
    """Return the best of the (step, value) pairs of `history`; of equal ones the first."""
    # `min` returns the first of equal keys, so an equal value later on is no improvement.
    step, value = min(history, key=lambda point: sort_key(metric, point[1]))
    return EvaluationPoint(step, value)


def should_stop_early(metric: str, history: Sequence[tuple[int, float]], patience: int) -> bool:
    """Return whether none of the last `patience` evaluations improved on those before.

    Patience 0: never.
    """
    # There must be an earlier evaluation that the last `patience` could have improved on.
    if not patience or len(history) <= patience:
        return False

    last_steps = {step for step, _ in history[-patience:]}
    return find_best(metric, history).step not in last_steps
