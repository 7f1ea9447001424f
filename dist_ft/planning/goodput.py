"""Where the wall time of a run went, over all its attempts, out of the accounts they kept. Pure.

A run's wall time goes from the begin of its first attempt to the last sign of life of its last one. Durations within an
attempt come from one steady clock; only the time between two attempts is the difference of two machines' clocks, and
counts as nothing where these contradict each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

WORK = ("compute", "evaluation", "data", "other")
"""Parts that are lost where the steps they were spent on are done again."""
PARTS = {
    "compute": "steps that count",
    "evaluation": "loss on held-out data",
    "data": "waiting for data",
    "save": "training stood still for a save",
    "start": "opening the data, loading model and checkpoint",
    "restart": "between attempts: to notice and start again, pauses",
    "lost": "work that a later attempt had to do again",
    "other": "not attributed",
}


@dataclass(frozen=True)
class Account:
    """What one attempt knows of its time.

    Attributes:
        attempt: its number.
        begun_at: when it began, seconds of its machine's clock.
        resumed_at: steps that were done before it; None: it did not get so far.
        seconds: spent on each part, since `begun_at`.
        marks: (steps done, seconds then) at each save, in order of time.
    """

    attempt: int
    begun_at: float
    resumed_at: int | None
    seconds: Mapping[str, float]
    marks: Sequence[tuple[int, Mapping[str, float]]] = ()

    @property
    def wall_s(self) -> float:
        """Seconds from its begin to its last sign of life."""
        return sum(self.seconds.values())


def spent(accounts: Sequence[Account]) -> dict[str, float]:
    """Return the seconds a run spent on each of PARTS; their sum is its wall time."""
    accounts = sorted(accounts, key=lambda account: account.attempt)
    total = dict.fromkeys(PARTS, 0.0)
    for account, later in zip(
        accounts, [accounts[i + 1 :] for i in range(len(accounts))], strict=True
    ):
        for part, seconds in settled(account, kept_steps(later)).items():
            total[part] += seconds
        if later:
            total["restart"] += max(0.0, later[0].begun_at - account.begun_at - account.wall_s)
    return total


def kept_steps(later: Sequence[Account]) -> int | None:
    """Return how many steps are left of what was done before the attempts `later`; None: all."""
    return min(
        (account.resumed_at for account in later if account.resumed_at is not None), default=None
    )


def settled(account: Account, kept: int | None) -> dict[str, float]:
    """Return the seconds of an attempt by part, where only its first `kept` steps count (None: all)."""
    seconds = {part: max(0.0, account.seconds.get(part, 0.0)) for part in PARTS}
    if kept is not None:
        before: Mapping[str, float] = {}
        for step, then in account.marks:
            if step <= kept:
                before = then
        for part in WORK:
            redone = max(0.0, seconds[part] - before.get(part, 0.0))
            seconds[part] -= redone
            seconds["lost"] += redone
    return seconds


def attributed(seconds: Mapping[str, float]) -> float:
    """Return the share of the wall time that is known to be something, 0..1."""
    wall_s = sum(seconds.values())
    return 1 - seconds["other"] / wall_s if wall_s else 1.0
