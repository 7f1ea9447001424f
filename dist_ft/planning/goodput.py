"""Where the wall time of a run was spent, over all its attempts. Pure.

The wall time of a run extends from the start of its first attempt to the last sign of life of its
last one. Durations within an attempt come from one monotonic clock. Only the time between two
attempts is a difference of two machines' clocks, and counts as zero where these contradict each
other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

WORK = ("compute", "evaluation", "data", "other")
"""Parts that are lost when the steps that they were spent on are repeated."""
PARTS = {
    "compute": "steps that count",
    "evaluation": "evaluation on held-out data",
    "data": "waiting for data",
    "save": "training paused for a save",
    "start": "opening the data, loading model and checkpoint",
    "restart": "between attempts: detection, restart, pauses",
    "lost": "work that a later attempt had to repeat",
    "other": "not attributed",
}
"""What the time of a run is divided into, and what each part means."""


@dataclass(frozen=True)
class AttemptTime:
    """What one attempt recorded about its time.

    Attributes:
        attempt: its number.
        started_at: when it started, seconds of its machine's clock.
        resumed_at: steps that were done before it; None: it ended before it looked for them.
        seconds: spent on each part since `started_at`.
        marks: (steps done, seconds at that time) at each save, in order of time.
    """

    attempt: int
    started_at: float
    resumed_at: int | None
    seconds: Mapping[str, float]
    marks: Sequence[tuple[int, Mapping[str, float]]] = ()

    @property
    def wall_s(self) -> float:
        """Seconds from its start to its last sign of life."""
        return sum(self.seconds.values())


def time_by_part(attempts: Sequence[AttemptTime]) -> dict[str, float]:
    """Return the seconds that a run spent on each of `PARTS`; their sum is its wall time."""
    # by number: the clocks of two machines may disagree on which attempt started first
    attempts = sorted(attempts, key=lambda attempt: attempt.attempt)
    total = dict.fromkeys(PARTS, 0.0)
    for number, attempt in enumerate(attempts):
        later = attempts[number + 1 :]
        # What a later attempt repeated is known only from where it resumed.
        for part, seconds in attempt_time_by_part(attempt, num_kept_steps(later)).items():
            total[part] += seconds

        if later:
            pause_s = later[0].started_at - attempt.started_at - attempt.wall_s
            total["restart"] += max(0.0, pause_s)
    return total


def num_kept_steps(later: Sequence[AttemptTime]) -> int | None:
    """Return how many steps done before the attempts `later` were not repeated; None: all."""
    # An attempt that ended before it looked for steps repeats nothing. The minimum, because an
    # attempt may resume from an earlier step than the one before it (a damaged checkpoint).
    resumed_at = [attempt.resumed_at for attempt in later if attempt.resumed_at is not None]
    return min(resumed_at, default=None)


def attempt_time_by_part(attempt: AttemptTime, num_kept: int | None) -> dict[str, float]:
    """Return the seconds of an attempt by part; only its steps before `num_kept` count (None: all).

    Work after the last save within these steps is lost.
    """
    # A part may be missing in files of other versions. Negative seconds would make other parts
    # larger than the wall time.
    seconds = {}
    for part in PARTS:
        seconds[part] = max(0.0, attempt.seconds.get(part, 0.0))
    if num_kept is None:
        return seconds

    # the account at the last save that counts; without one, all work of the attempt is lost
    kept: Mapping[str, float] = {}
    for step, seconds_then in attempt.marks:
        if step <= num_kept:
            kept = seconds_then

    for part in WORK:
        lost_s = max(0.0, seconds[part] - kept.get(part, 0.0))
        seconds[part] -= lost_s
        seconds["lost"] += lost_s
    return seconds


def attributed_share(seconds: Mapping[str, float]) -> float:
    """Return the share of the wall time that is attributed to a part, 0..1."""
    wall_s = sum(seconds.values())
    if not wall_s:
        return 1.0
    return 1 - seconds["other"] / wall_s
