"""Messages between driver, coordinator, supervisors and training processes.

All ends are of one version. A supervisor and its training process are joined by a pipe (pickles
between two processes of one user); supervisors and driver call the coordinator.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dist_ft.core.errors import DistFtError
from dist_ft.training.result import Result

LineKind = Literal["message", "progress", "log"]


@dataclass(frozen=True)
class OutputLine:
    """A line for the user's terminal.

    Attributes:
        kind: "message" or "progress" for rank 0's console, "log" for a log line of any rank.
        text: the line.
    """

    kind: LineKind
    text: str


@dataclass(frozen=True)
class CommittedCheckpoint:
    """A checkpoint in the run's storage, with the metrics that Ray shows next to it."""

    url: str
    metrics: dict[str, float]


@dataclass(frozen=True)
class RunStatus:
    """What the coordinator answers a supervisor.

    Attributes:
        generation: the current one.
        rendezvous: host:port where its rank 0 listens; None: workers are missing, or the backoff is
            not over.
        stop: the user requested a stop.
        save_number: number of the latest requested save; counts from 1, 0 if none was requested.
        is_over: this supervisor has nothing left to do.
        reason: why the generation before ended; "" for the first.
        checkpoints: checkpoints of the run that this supervisor has not seen yet, oldest first.
        must_leave: the node of this supervisor is left out: Ray must place all workers anew.
    """

    generation: int
    rendezvous: str | None = None
    stop: bool = False
    save_number: int = 0
    is_over: bool = False
    reason: str = ""
    checkpoints: tuple[CommittedCheckpoint, ...] = ()
    must_leave: bool = False


@dataclass(frozen=True)
class RunHealth:
    """What the driver watches.

    Attributes:
        generation: the current one.
        reason: why the generation before ended; "" for the first.
        num_signs: signs of progress so far; only whether it grows matters.
        step: the last step that was reported; None before the first.
    """

    generation: int
    reason: str
    num_signs: int
    step: int | None


# From a supervisor to its training process: one `Setup`, one `StartTraining`, then requests.


@dataclass(frozen=True)
class Setup:
    """The first message: import what this config needs.

    Attributes:
        config: the run's config as JSON data.
        folder: working directory, entered if it exists.
        modules: names of further modules to import, as an earlier process of the run needed them.
    """

    config: dict[str, Any]
    folder: str
    modules: tuple[str, ...] = ()


@dataclass(frozen=True)
class StartTraining:
    """The second message.

    Attributes:
        environment: variables that torchrun would set.
        reason: why the generation before ended; "" for the first.
    """

    environment: dict[str, str]
    reason: str


@dataclass(frozen=True)
class StopRequest:
    """Save a checkpoint and exit."""


@dataclass(frozen=True)
class SaveRequest:
    """Save a checkpoint and continue training; answered with `SaveDone`."""

    number: int


# From a training process to its supervisor, any number of each while it trains.


@dataclass(frozen=True)
class FirstStepsDone:
    """Training is under way, and starting a spare no longer delays it; names all imports."""

    modules: tuple[str, ...]


@dataclass(frozen=True)
class ProgressSign:
    """A sign of progress, sent every few seconds; `step` is the last one that is done."""

    step: int | None


@dataclass(frozen=True)
class MetricsLine:
    """A line of the metrics log."""

    step: int
    kind: str
    values: Mapping[str, float]


@dataclass(frozen=True)
class LocalCheckpointCommitted:
    """A checkpoint was committed on the workers' nodes only."""


@dataclass(frozen=True)
class SaveDone:
    """All save requests up to `number` are done: saved, or the log says why not."""

    number: int


# The last message of a training process: exactly one, or `ProcessExited` in its place.


@dataclass(frozen=True)
class TrainingFinished:
    """The run reached its end or was stopped after a checkpoint."""

    result: Result


@dataclass(frozen=True)
class TrainingFailed:
    """Training ended with one of the package's own errors."""

    error: DistFtError


@dataclass(frozen=True)
class TrainingCrashed:
    """Training ended with another exception.

    Attributes:
        is_peer_loss: it only says that another worker vanished.
        text: one line of the exception.
    """

    is_peer_loss: bool
    text: str


@dataclass(frozen=True)
class ProcessExited:
    """The process ended without another last message (added by the supervisor's end of the pipe).

    Attributes:
        code: exit code; negative: the signal that killed it.
    """

    code: int


LastMessage = TrainingFinished | TrainingFailed | TrainingCrashed
WorkerMessage = (
    OutputLine
    | FirstStepsDone
    | MetricsLine
    | ProgressSign
    | CommittedCheckpoint
    | LocalCheckpointCommitted
    | SaveDone
    | LastMessage
    | ProcessExited
)
