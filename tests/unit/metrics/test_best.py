"""Losses and errors are better when lower, other metrics when higher.

NaN and infinity are never better.
"""

from __future__ import annotations

import math

from dist_ft.metrics.best import find_best, should_stop_early, sort_key

LOSSES = [(0, 3.0), (5, 2.0), (10, 2.5), (15, 2.0), (20, 2.1)]


def test_best_of_equal_evaluations_is_the_first():
    assert find_best("loss", LOSSES) == (5, 2.0)
    assert find_best("f1", [(1, 0.2), (2, 0.7), (3, 0.7)]) == (2, 0.7)
    assert find_best("loss", [(1, math.nan), (2, 9.0)]) == (2, 9.0)
    assert sort_key("f1", math.nan) == sort_key("loss", math.inf) == math.inf


def test_early_stopping_counts_evaluations_since_the_best():
    assert [should_stop_early("loss", LOSSES[:n], 2) for n in range(1, 6)] == [
        False,
        False,
        False,
        True,
        True,
    ]
    assert not any(should_stop_early("loss", LOSSES[:n], 4) for n in range(1, 6))
    assert not should_stop_early("loss", LOSSES, 0) and not should_stop_early("loss", [], 3)
    assert not should_stop_early("loss", [(0, 3.0), (5, math.nan), (10, 2.9)], 2)
    assert should_stop_early("loss", [(0, 3.0), (5, math.nan), (10, math.nan)], 2)
