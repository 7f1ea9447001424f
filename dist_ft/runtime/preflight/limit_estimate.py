"""Whether a run is likely to reach run.max_hours or run.max_cost before its last step.

An estimate needs steps that this run has trained, from its storage. Before them, the line says how
long a step may take.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from dist_ft.checkpoint import discovery
from dist_ft.checkpoint.manifest import Progress
from dist_ft.config.schema import RunConfig
from dist_ft.core.errors import DistFtError
from dist_ft.planning.run_limits import RunLimits, Usage
from dist_ft.runtime.bootstrap.run_usage import read_usage
from dist_ft.storage import filesystem
from dist_ft.storage.filesystem import Store
from dist_ft.storage.retry import retry_limit

TRIES, TIMEOUT_S = 2, 20.0


class _Stored(NamedTuple):
    """The progress of the latest checkpoint, and what all attempts used."""

    progress: Progress
    used: Usage


def limit_lines(config: RunConfig) -> Iterator[str]:
    """Yield a line on the limits of the run, if it has any; it starts with WARNING if too low."""
    if config.run.max_hours is None and config.run.max_cost is None:
        return

    num_workers = max(1, config.max_workers)
    progress, used = _read_stored(config, num_workers)
    limits = RunLimits.from_config(config, num_workers, used).with_trained(progress.trained_s)
    hours_left = limits.hours_left()
    if hours_left <= 0:
        yield f"WARNING {limits.reached(0)}; the run will not train; {limits.remedy}"
        return

    total_steps = config.schedule.steps
    workers = "1 worker" if num_workers == 1 else f"{num_workers} workers"
    left = f"{hours_left:.2f} hours are left to {_names(limits)} on {workers}"
    if total_steps is None:
        yield f"{left}; whether they suffice is not known (schedule.epochs)"
        return

    steps_left = max(0, total_steps - progress.step)
    if not progress.step or not progress.trained_s:
        longest_s = hours_left * 3600 / max(1, steps_left)
        yield (
            f"{left}: enough for {steps_left:,} steps of at most {longest_s:.3g} s each, with "
            "start, evaluations and saves"
        )
        return

    # Other workers take other times; but only this run's own steps are known.
    step_s = progress.trained_s / progress.step
    needed_hours = steps_left * step_s / 3600
    estimate = f"the {steps_left:,} steps left need {needed_hours:.2f} hours at {step_s:.3g} s each"
    if needed_hours <= hours_left:
        yield f"{left}; {estimate}, as so far"
        return

    last_step = progress.step + int(hours_left * 3600 / step_s)
    yield (
        f"WARNING {left}, but {estimate}, as so far; the run would save and stop near step "
        f"{last_step:,} of {total_steps:,}. Raise {_names(limits)}, or lower schedule.steps"
    )


def _names(limits: RunLimits) -> str:
    """Return the field of the limit, or both fields."""
    fields = []
    if limits.max_hours is not None:
        fields.append(f"run.max_hours={limits.max_hours:g}")
    if limits.max_cost is not None:
        fields.append(f"run.max_cost={limits.max_cost:g}")
    return " and ".join(fields)


def _read_stored(config: RunConfig, num_workers: int) -> _Stored:
    filesystem.configure(config.storage.options)
    start, store = Progress(step=0, optimizer_step=0), Store(config.run_url)

    # Storage that does not answer here is a line of another check.
    try:
        with retry_limit(TRIES, TIMEOUT_S):
            used = read_usage(store, num_workers)
            names = discovery.list_committed(store)
            if names:
                start = discovery.load_manifest(store, names[0]).progress
    except DistFtError:
        return _Stored(start, Usage())

    return _Stored(start, used)
