"""Computes how often to save from the cost of a save and the failure rate. No side effects.

Sources: J. W. Young, "A first order approximation to the optimum checkpoint interval", CACM 17
(1974); J. T. Daly, "A higher order estimate of the optimum checkpoint interval for restart dumps",
FGCS 22 (2006).
"""

from __future__ import annotations

import math

MIN_INTERVAL_PER_WRITING = 1.1
"""Shortest interval, relative to the time it takes to write a save."""


def daly_interval_s(cost_s: float, between_failures_s: float) -> float:
    """Return the training time between two saves that loses least time (Daly's estimate).

    Args:
        cost_s: seconds of training that one save costs.
        between_failures_s: mean time between failures.
    """
    # Daly's estimate holds for smaller costs only; for larger ones he gives this value.
    if cost_s >= 2 * between_failures_s:
        return between_failures_s

    # Young's first-order interval sqrt(2 C M), with terms of higher order.
    root = math.sqrt(cost_s / (2 * between_failures_s))
    return math.sqrt(2 * cost_s * between_failures_s) * (1 + root / 3 + root * root / 9) - cost_s


def mean_time_between_failures_s(expected_s: float, trained_s: float, num_failures: int) -> float:
    """Return the mean time between failures.

    The observed one increasingly outweighs the expected one.
    """
    # As if one failure had been observed in `expected_s` before the run.
    return (expected_s + trained_s) / (1 + num_failures)


class SaveCost:
    """Measures the cost of a save: time training is blocked, and slowdown of steps meanwhile.

    Attributes:
        cost_s: seconds of training that the last save cost; None before the first save has ended.
    """

    def __init__(self) -> None:
        self._step_s: float | None = None  # moving average of steps without a save
        self._steps_during_save_s: list[float] = []
        self._blocked_s = 0.0
        self._writing_s = 0.0
        self.cost_s: float | None = None

    def record_step(self, seconds: float, busy: bool) -> None:
        """Record the time of a step; `busy` if a save was being written during it."""
        if busy:
            self._steps_during_save_s.append(seconds)
            self._writing_s += seconds
        elif self._step_s is None:
            self._step_s = seconds
        else:
            # The time of a step changes over a run, so the last ten or so count most.
            self._step_s = 0.9 * self._step_s + 0.1 * seconds

    def record_start(self, blocked_s: float) -> None:
        """Record that a save has started, which blocked training for `blocked_s` seconds."""
        self._steps_during_save_s = []
        self._writing_s = 0.0
        self._blocked_s = blocked_s

    def record_end(self) -> None:
        """Record that the save has ended."""
        # Without a step before the save there is nothing to compare with.
        slowdown_s = 0.0
        if self._step_s is not None:
            slowdown_s = sum(seconds - self._step_s for seconds in self._steps_during_save_s)

        # Noise may make the slowdown negative, and an interval needs a positive cost.
        self.cost_s = max(self._blocked_s + slowdown_s, 1e-3)

    def optimal_interval_s(self, between_failures_s: float) -> float | None:
        """Return the training time between saves that loses least.

        None before the first save has ended.
        """
        if self.cost_s is None:
            return None

        # A save that becomes due while another is being written would wait for it.
        shortest_s = MIN_INTERVAL_PER_WRITING * self._writing_s
        return max(daly_interval_s(self.cost_s, between_failures_s), shortest_s)
