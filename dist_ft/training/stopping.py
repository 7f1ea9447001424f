"""Requests that all ranks agree on, and the error with which training stops early."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from dist_ft.core.errors import DistFtError, Interrupted, LimitReached
from dist_ft.core.logs import redact
from dist_ft.core.world import on_rank0
from dist_ft.training.components import Components

_NOT_SAVED = "storage failed, so this step is not saved (the log says why)"


class Requests(NamedTuple):
    """Whether any rank was requested to stop or to save, and whether a limit is reached."""

    stop: bool
    save: bool
    limit: bool

    @property
    def stops(self) -> bool:
        """Whether training stops after this step."""
        return self.stop or self.limit


@dataclass(frozen=True)
class StopPoint:
    """Where training stops.

    Attributes:
        step: steps done.
        total_steps: steps of the run.
        url: of the checkpoint of this step; None if storage failed.
    """

    step: int
    total_steps: int
    url: str | None


def is_limit_reached(components: Components) -> bool:
    """Return whether rank 0 finds that the run reached a limit; False on other ranks."""
    # Clocks of ranks differ: only rank 0 decides, and the sum over ranks carries it to all.
    limits = components.limits
    if components.world.rank != 0 or not limits.is_set:
        return False
    return bool(limits.reached(components.time_ledger.elapsed_s()))


def stop_error(requests: Requests, point: StopPoint, components: Components) -> DistFtError:
    """Return the error of a run that stops at `point`; a collective call if a limit is reached."""
    if requests.stop:
        return _interrupted(point)

    # One text for all ranks, by the clock of rank 0.
    limits, elapsed_s = components.limits, components.time_ledger.elapsed_s()
    reason = on_rank0(components.world, components.collectives, lambda: limits.reached(elapsed_s))
    saved = _NOT_SAVED if point.url is None else f"saved as {redact(point.url)}"
    return LimitReached(
        f"{reason}; stopped at step {point.step} of {point.total_steps}; {saved}; {limits.remedy}"
    )


def _interrupted(point: StopPoint) -> Interrupted:
    """Return the error of a run that was requested to stop."""
    if point.url is not None:
        end = f"saved as {redact(point.url)}; the same command resumes from there"
    else:
        end = f"{_NOT_SAVED}; the same command resumes from the checkpoint before"

    return Interrupted(f"stopped at step {point.step} of {point.total_steps} as requested; {end}")
