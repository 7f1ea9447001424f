"""When restarts and a lack of progress are worth a notice. Pure: no clock, no side effects."""

from __future__ import annotations

from collections.abc import Sequence


class RestartCounter:
    """Counts restarts within a time."""

    def __init__(self, limit: int, within_s: float, earlier_s: Sequence[float] = ()) -> None:
        """Start with the times of `earlier_s`, in seconds on any clock, in any order."""
        self._limit = limit
        self._within_s = within_s
        self._times_s = sorted(earlier_s)

    def add(self, now_s: float) -> int:
        """Count a restart; return how many there were if that is worth a notice, else 0."""
        self._times_s.append(now_s)
        self._times_s = [at_s for at_s in self._times_s if now_s - at_s <= self._within_s]
        num_restarts = len(self._times_s)
        if num_restarts < self._limit:
            return 0

        # The next notice needs as many restarts again.
        self._times_s.clear()
        return num_restarts


class ProgressWatch:
    """Recognizes that a run makes no progress; one notice for each time it stands still."""

    def __init__(self, limit_s: float, now_s: float) -> None:
        """Watch from now on; `limit_s` 0 watches nothing."""
        self._limit_s = limit_s
        self._progress_s = now_s
        self._is_reported = False

    def record(self, now_s: float) -> None:
        """Note progress."""
        self._progress_s = now_s
        self._is_reported = False

    def standstill_s(self, now_s: float) -> float:
        """Return the seconds without progress if that is worth a notice now, else 0."""
        silent_s = now_s - self._progress_s
        if not self._limit_s or silent_s < self._limit_s or self._is_reported:
            return 0.0

        self._is_reported = True
        return silent_s
