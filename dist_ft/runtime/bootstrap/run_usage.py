"""What the attempts of a run used so far, read from its storage.

An attempt's time is in `time/`, its number of workers in `attempts/`. Time that no record has is
not counted, but never less than the training time that the latest checkpoint has
(`RunLimits.with_trained`).
"""

from __future__ import annotations

from dist_ft.checkpoint.attempt_records import AttemptRecord, read_attempts
from dist_ft.config.schema import RunConfig
from dist_ft.core.errors import LimitReached
from dist_ft.core.world import Collectives, World, on_rank0
from dist_ft.planning.run_limits import RunLimits, Usage
from dist_ft.storage.filesystem import Store


def require_time_left(
    config: RunConfig,
    store: Store,
    world: World,
    collectives: Collectives,
    restarted_s: float | None,
) -> RunLimits:
    """Return the limits of the run; a collective call.

    Args:
        config: the run.
        store: the run's folder.
        world: the workers of this attempt.
        collectives: the control channel.
        restarted_s: see `read_usage`.

    Raises:
        LimitReached: earlier attempts used them up.
    """
    if config.run.max_hours is None and config.run.max_cost is None:
        return RunLimits()

    def read() -> RunLimits:
        used = read_usage(store, world.num_ranks, restarted_s)
        limits = RunLimits.from_config(config, world.num_ranks, used)
        reason = limits.reached(0)
        if reason:
            raise LimitReached(f"{reason}; no step was trained now; {limits.remedy}")
        return limits

    return on_rank0(world, collectives, read)


def read_usage(store: Store, num_workers: int, restarted_s: float | None = None) -> Usage:
    """Return what all attempts at the run used until now.

    Args:
        store: the run's folder.
        num_workers: assumed for attempts whose record is lost.
        restarted_s: when a process started (time.time) that follows a failure without a new
            command: the time since the last attempt counts then. None: there is no such process.

    Raises:
        StorageError: storage cannot be listed.
    """
    attempts = read_attempts(store)
    seconds = worker_seconds = 0.0
    for index, attempt in enumerate(attempts):
        next_start_s = restarted_s
        if index + 1 < len(attempts):
            next_start_s = _restart_s(attempts[index + 1])

        used_s = attempt.spent_s + _pause_s(attempt, next_start_s)
        seconds += used_s
        worker_seconds += used_s * (attempt.num_workers or num_workers)

    return Usage(seconds, worker_seconds, len(attempts))


def _restart_s(attempt: AttemptRecord) -> float | None:
    """Return when an attempt started that followed a failure by itself; else None."""
    return attempt.started_s if attempt.previous_end else None


def _pause_s(attempt: AttemptRecord, next_start_s: float | None) -> float:
    """Return the seconds in which workers were occupied between an attempt and its restart."""
    if next_start_s is None or attempt.started_s is None:
        return 0.0

    # Clocks of two machines may contradict each other.
    return max(0.0, next_start_s - attempt.started_s - attempt.spent_s)
