"""Better is lower for losses and errors, higher for the rest; what is no number is never better."""

from __future__ import annotations

import math

from dist_ft.metrics.best import best, is_over, rank

LOSSES = [(0, 3.0), (5, 2.0), (10, 2.5), (15, 2.0), (20, 2.1)]


def test_the_best_is_the_first_of_equals():
    assert best("loss", LOSSES) == (5, 2.0)
    assert best("f1", [(1, 0.2), (2, 0.7), (3, 0.7)]) == (2, 0.7)
    assert best("loss", [(1, math.nan), (2, 9.0)]) == (2, 9.0)
    assert rank("f1", math.nan) == rank("loss", math.inf) == math.inf


def test_patience_counts_evaluations_since_the_best():
    assert [is_over("loss", LOSSES[:n], 2) for n in range(1, 6)] == [
        False,
        False,
        False,
        True,
        True,
    ]
    assert not any(is_over("loss", LOSSES[:n], 4) for n in range(1, 6))
    assert not is_over("loss", LOSSES, 0) and not is_over("loss", [], 3)
    assert not is_over("loss", [(0, 3.0), (5, math.nan), (10, 2.9)], 2)
    assert is_over("loss", [(0, 3.0), (5, math.nan), (10, math.nan)], 2)
