"""Limits of the time and the cost of a run, over all its attempts (run.max_hours, run.max_cost).

Only rank 0 looks at its clock: what it finds is part of the sum over ranks that each step makes.
Pure.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

from dist_ft.config.schema import RunConfig


class Usage(NamedTuple):
    """What the attempts of a run used.

    Attributes:
        seconds: wall time of all attempts, and of the automatic restarts between them.
        worker_seconds: the same, times the number of workers of each attempt.
        num_attempts: number of attempts.
    """

    seconds: float = 0.0
    worker_seconds: float = 0.0
    num_attempts: int = 0


@dataclass(frozen=True)
class RunLimits:
    """The limits of a run, and what it used before this attempt.

    Attributes:
        max_hours: limit of the time; None: no limit.
        max_cost: limit of the cost; None: no limit.
        cost_per_hour: cost of one worker.
        num_workers: of this attempt.
        used: what earlier attempts used.
    """

    max_hours: float | None = None
    max_cost: float | None = None
    cost_per_hour: float = 0.0
    num_workers: int = 1
    used: Usage = field(default_factory=Usage)

    @classmethod
    def from_config(cls, config: RunConfig, num_workers: int, used: Usage) -> RunLimits:
        """Return the limits of `config` for an attempt of `num_workers` workers."""
        return cls(
            max_hours=config.run.max_hours,
            max_cost=config.run.max_cost,
            cost_per_hour=config.cluster.cost_per_hour,
            num_workers=num_workers,
            used=used,
        )

    @property
    def is_set(self) -> bool:
        """Whether there is any limit."""
        return self.max_hours is not None or self.max_cost is not None

    def with_trained(self, trained_s: float) -> RunLimits:
        """Return the limits of a run whose steps took `trained_s` seconds so far.

        A checkpoint has this time too, so that lost records do not set a run's time back.
        """
        seconds = max(self.used.seconds, trained_s)
        worker_seconds = max(self.used.worker_seconds, trained_s)
        used = self.used._replace(seconds=seconds, worker_seconds=worker_seconds)
        return replace(self, used=used)

    def hours(self, elapsed_s: float) -> float:
        """Return the hours of the run when this attempt has run for `elapsed_s`."""
        return (self.used.seconds + elapsed_s) / 3600

    def cost(self, elapsed_s: float) -> float:
        """Return the cost of the run when this attempt has run for `elapsed_s`."""
        worker_seconds = self.used.worker_seconds + elapsed_s * self.num_workers
        return worker_seconds / 3600 * self.cost_per_hour

    def hours_left(self) -> float:
        """Return after how many hours of this attempt the first limit is reached; may be inf."""
        left = [float("inf")]
        if self.max_hours is not None:
            left.append(self.max_hours - self.hours(0))

        price = self.cost_per_hour * self.num_workers
        if self.max_cost is not None and price > 0:
            left.append((self.max_cost - self.cost(0)) / price)
        return min(left)

    def reached(self, elapsed_s: float) -> str:
        """Return which limit is reached, as the start of a message; "" if none is."""
        hours, cost = self.hours(elapsed_s), self.cost(elapsed_s)
        if self.max_hours is not None and hours >= self.max_hours:
            return f"run.max_hours={self.max_hours:g}: reached, with {self._spent(elapsed_s)}"
        if self.max_cost is not None and cost >= self.max_cost:
            return f"run.max_cost={self.max_cost:g}: reached, with {self._spent(elapsed_s)}"
        return ""

    @property
    def remedy(self) -> str:
        """What to do to resume a run that reached a limit."""
        fields = []
        if self.max_hours is not None:
            fields.append("run.max_hours")
        if self.max_cost is not None:
            fields.append("run.max_cost")
        return f"raise {' or '.join(fields)}, then run the same command to resume"

    def _spent(self, elapsed_s: float) -> str:
        # This attempt counts too, once it has run for a while.
        num_attempts = self.used.num_attempts + (elapsed_s > 0)
        plural = "" if num_attempts == 1 else "s"
        text = f"{self.hours(elapsed_s):.2f} hours of {num_attempts} attempt{plural}"
        if self.max_cost is not None:
            text += f" and a cost of {self.cost(elapsed_s):.2f}"
        return text
