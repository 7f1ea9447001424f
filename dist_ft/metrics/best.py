"""Which evaluations are better: by any metric, some of which are better when lower. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence

LOWER = ("loss", "perplexity", "mse", "mae", "calibration_error", "token_error_rate")
"""Metrics that are better when lower; all others are better when higher."""


def rank(metric: str, value: float) -> float:
    """Return a number that is lower the better `value` is; infinity for one that is no number."""
    if not math.isfinite(value):
        return math.inf
    return value if metric in LOWER else -value


def best(metric: str, values: Sequence[tuple[int, float]]) -> tuple[int, float]:
    """Return step and value of the best evaluation of (step, value), of equals the first."""
    return min(values, key=lambda found: rank(metric, found[1]))


def is_over(metric: str, values: Sequence[tuple[int, float]], patience: int) -> bool:
    """Tell whether the last `patience` evaluations have not been better than one before them; 0: never."""
    if not patience or len(values) <= patience:
        return False
    return best(metric, values)[0] not in {step for step, _ in values[-patience:]}
