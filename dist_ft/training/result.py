"""What goes into a run from its surroundings, and what comes out. Light: no torch, so that a driver starts fast."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from dist_ft.training.console import Console


@dataclass(frozen=True)
class Result:
    """How a run stands when its process is done with it.

    Attributes:
        evaluation_before, evaluation_after: held-out loss before step 1 and after the last; None where not asked for.
        checkpoint: URL of the newest commit; None without one.
        data_wait_share: share of the steps' time rank 0 waited for data, 0..1; None without a step.
    """

    run_url: str
    step: int
    total_steps: int
    loss: float | None = None
    evaluation_before: float | None = None
    evaluation_after: float | None = None
    checkpoint: str | None = None
    data_wait_share: float | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Hooks:
    """What the surroundings of a run lend it.

    Attributes:
        console: where rank 0 speaks.
        committed: called on all ranks with (checkpoint URL, metrics) after a commit.
        progressed: called on all ranks after a commit on the workers' nodes only.
        should_stop: asked on every rank once a step; one True stops all after that step, with a checkpoint.
        should_save: asked on every rank once a step, True until `saved`; one True: all save after that step and wait.
        saved: called on every rank when that save is over; `committed` was called if it went well.
        beat: called on every rank whenever there is progress: a step, an evaluated batch, a save.
        log: also gets the log lines of this worker; none: they go to stderr only.
        after: why the attempt before this one ended, as far as the surroundings know; "" if they do not.
        evaluated: called on rank 0 with (step, metrics) after an evaluation.
        measured: called on rank 0 with (step, kind, values) of every line of metrics.
    """

    console: Console = field(default_factory=Console)
    committed: Callable[[str, dict[str, float]], None] = lambda url, metrics: None
    progressed: Callable[[], None] = lambda: None
    should_stop: Callable[[], bool] = lambda: False
    should_save: Callable[[], bool] = lambda: False
    saved: Callable[[], None] = lambda: None
    beat: Callable[[], None] = lambda: None
    log: logging.Handler | None = None
    after: str = ""
    evaluated: Callable[[int, dict[str, float]], None] = lambda step, metrics: None
    measured: Callable[[int, str, Mapping[str, float]], None] = lambda step, kind, values: None
