"""How often to save, from what a save costs and how often the run fails. Pure.

Sources: J. W. Young, "A first order approximation to the optimum checkpoint interval", CACM 17 (1974); J. T. Daly, "A
higher order estimate of the optimum checkpoint interval for restart dumps", FGCS 22 (2006).
"""

from __future__ import annotations

import math

LONGER_THAN_WRITING = 1.1
"""A save begins when the one before was written, and not on its heels."""


def best_interval_s(cost_s: float, between_failures_s: float) -> float:
    """Return the seconds of training between two saves that lose least time (Daly's higher order estimate).

    Args:
        cost_s: seconds of training one save costs.
        between_failures_s: mean time between failures.
    """
    if cost_s >= 2 * between_failures_s:
        return between_failures_s
    root = math.sqrt(cost_s / (2 * between_failures_s))
    return math.sqrt(2 * cost_s * between_failures_s) * (1 + root / 3 + root * root / 9) - cost_s


def between_failures_s(expected_s: float, trained_s: float, num_failures: int) -> float:
    """Return the mean time between failures: what was expected, outweighed by what was seen as time goes on."""
    return (expected_s + trained_s) / (1 + num_failures)


class SaveCost:
    """What saves cost, measured: the time training stands still, and by how much steps are slower meanwhile."""

    def __init__(self) -> None:
        self._free_s: float | None = None
        self._busy: list[float] = []
        self._stalled_s = 0.0
        self._writing_s = 0.0
        self.cost_s: float | None = None

    def step(self, seconds: float, busy: bool) -> None:
        """Note a step, and whether a save was being written during it."""
        if busy:
            self._busy.append(seconds)
            self._writing_s += seconds
        else:
            self._free_s = seconds if self._free_s is None else 0.9 * self._free_s + 0.1 * seconds

    def begun(self, stalled_s: float) -> None:
        """Note that a save was begun, for which training stood still so long."""
        self._busy, self._writing_s, self._stalled_s = [], 0.0, stalled_s

    def written(self) -> None:
        """Note that the save has ended."""
        free = self._free_s or 0.0
        slower = sum(seconds - free for seconds in self._busy) if self._free_s is not None else 0.0
        self.cost_s = max(self._stalled_s + slower, 1e-3)

    def best_s(self, failures_s: float) -> float | None:
        """Return the seconds between saves that lose least; None before the first has ended."""
        if self.cost_s is None:
            return None
        return max(best_interval_s(self.cost_s, failures_s), LONGER_THAN_WRITING * self._writing_s)
