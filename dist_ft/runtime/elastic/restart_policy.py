"""Decides whether a run waits, restarts or gives up when workers fail or are replaced.

Pure: no clock, no side effects. `WorkerGroupState` carries the decisions out. The rules:

- Each failure costs one restart of the budget `cluster.max_failures`; a new checkpoint refills the
  budget.
- Restarts are spaced out: the first is immediate, later ones wait 1, 2, 4, ... seconds, at most
  `MAX_BACKOFF_S`.
- A failure that repeats exactly, without a new checkpoint in between, is not retried a third time.
- A worker whose peer vanished is not the cause: for `SETTLE_S` the policy waits for a report of the
  peer's own failure.
- The loss of a node that was announced, and a change to more workers, cost nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from dist_ft.core.errors import PLANNED

FailureKind = Literal[
    "killed", "crash", "hang", "out of memory", "storage", "peer", "error", "lost"
]
SETTLE_S = 0.7
"""How long to wait for the cause after a worker only reported that a peer vanished."""
MAX_BACKOFF_S = 60.0
"""Longest pause before a restart."""
REPEATABLE_KINDS = ("error", "out of memory", "crash")
"""A restart does not cure these if they repeat: code, data or config causes them."""


@dataclass(frozen=True)
class Failure:
    """Why a generation ended: whose process failed, and how."""

    rank: int
    node: str
    kind: FailureKind
    text: str

    def __str__(self) -> str:
        return f"worker {self.rank} on node {self.node}: {self.kind} ({self.text})"


@dataclass(frozen=True)
class FailureReport:
    """A failure and when it was reported, in seconds on any steady clock."""

    failure: Failure
    at_s: float


@dataclass(frozen=True)
class AnnouncedLoss:
    """A node whose removal was announced.

    Attributes:
        description: names the nodes and their workers, e.g. "node abc (worker 2)".
        last_generation: the last generation whose loss this explains. The peers of a lost worker
            may fail before it is replaced, so this is the generation after the one that was running
            at the announcement.
    """

    description: str
    last_generation: int


@dataclass(frozen=True)
class RestartHistory:
    """What the policy needs to know of the run so far.

    Attributes:
        failures: failures that cost a restart since the last checkpoint, oldest first.
        start_at_s: the earliest start of the next generation, on the clock of the reports.
        announced_loss: a removal of nodes that has not happened yet.
    """

    failures: tuple[Failure, ...] = ()
    start_at_s: float = 0.0
    announced_loss: AnnouncedLoss | None = None


@dataclass(frozen=True)
class Wait:
    """Decide later: the cause may still be reported until then."""

    until_s: float


@dataclass(frozen=True)
class Restart:
    """Start the next generation.

    Attributes:
        reason: why the generation before it ended; stored with the next attempt.
        history: the history from now on; its `start_at_s` says when to start.
        cause: the failure; None if workers were only added.
    """

    reason: str
    history: RestartHistory
    cause: Failure | None


@dataclass(frozen=True)
class GiveUp:
    """End the run.

    Attributes:
        reason: why the last generation ended.
        history: the history from now on.
        cause: the failure.
        message: the error for the user.
    """

    reason: str
    history: RestartHistory
    cause: Failure
    message: str


@dataclass(frozen=True)
class RestartPolicy:
    """The policy of one run.

    Attributes:
        max_failures: restarts that are allowed without a new checkpoint in between; -1: no limit.
    """

    max_failures: int

    def on_failure(
        self,
        reports: Sequence[FailureReport],
        generation: int,
        history: RestartHistory,
        now_s: float,
    ) -> Wait | Restart | GiveUp:
        """Decide on the failures that `generation` reported so far, oldest first, at least one."""
        # A cause decides at once. Reports of lost peers alone wait, from the first one on.
        times_s = []
        for report in reports:
            settle_s = SETTLE_S if report.failure.kind == "peer" else 0.0
            times_s.append(report.at_s + settle_s)

        decide_at_s = min(times_s)
        if now_s < decide_at_s:
            return Wait(decide_at_s)

        return self._decide(find_cause(reports), generation, history, now_s)

    def on_replacement(
        self,
        replacement: Failure,
        *,
        is_larger: bool,
        has_started: bool,
        generation: int,
        history: RestartHistory,
        now_s: float,
    ) -> Restart | GiveUp:
        """Decide after another group of workers took the place of the running one.

        Args:
            replacement: the loss to count, unless the new group is larger.
            is_larger: whether the new group has more workers: the run grows, and nothing was lost.
            has_started: whether all workers of the replaced group joined the current generation.
            generation: the current one.
            history: history of the run so far.
            now_s: the time, on the clock of the reports.
        """
        failures = history.failures
        if failures and failures[-1].kind == "peer" and not has_started:
            # The peers of a lost worker reported the same loss first: count it once.
            history = replace(history, failures=failures[:-1])

        # The workers of the smaller group ended because Ray replaced them, not by a failure.
        if is_larger:
            return Restart(f"{PLANNED}more workers joined", history, None)
        return self._decide(replacement, generation, history, now_s)

    def _decide(
        self, cause: Failure, generation: int, history: RestartHistory, now_s: float
    ) -> Restart | GiveUp:
        # An announced loss explains only these two kinds: a crash at that time is still a crash.
        loss = history.announced_loss
        if (
            loss is not None
            and generation <= loss.last_generation
            and cause.kind in ("lost", "peer")
        ):
            # After a peer's report the loss itself is still to come, so the announcement stays.
            pending = loss if cause.kind == "peer" else None
            reason = f"{PLANNED}{loss.description} was taken away, as announced"
            return Restart(reason, replace(history, announced_loss=pending), cause)

        failures = (*history.failures, cause)
        history = replace(
            history, failures=failures, start_at_s=now_s + backoff_s(num_failures=len(failures))
        )

        # The cause itself is counted too: max_failures=0 allows none.
        message = self._reason_to_give_up(failures)
        if message is not None:
            return GiveUp(str(cause), history, cause, message)

        return Restart(str(cause), history, cause)

    def _reason_to_give_up(self, failures: Sequence[Failure]) -> str | None:
        cause = failures[-1]
        if 0 <= self.max_failures < len(failures):
            return (
                f"gave up after cluster.max_failures={self.max_failures} restarts without a new "
                f"checkpoint in between ({cause}); saved checkpoints are kept; run the same "
                "command to resume"
            )

        # Kind and text, not the rank: a fault in code or data may hit another worker each time.
        if cause.kind in REPEATABLE_KINDS and len(failures) > 1:
            previous = failures[-2]
            if (previous.kind, previous.text) == (cause.kind, cause.text):
                return (
                    f"the same failure repeated without a new checkpoint in between ({cause}); "
                    "another restart would not help; saved checkpoints are kept; fix the cause, "
                    "then run the same command to resume"
                )
        return None


def find_cause(reports: Sequence[FailureReport]) -> Failure:
    """Return the first failure that is not merely the loss of a peer; else the first."""
    for report in reports:
        if report.failure.kind != "peer":
            return report.failure
    return reports[0].failure


def backoff_s(num_failures: int) -> float:
    """Return the seconds until the next start; `num_failures`: since the last checkpoint."""
    if num_failures <= 1:
        return 0.0

    return min(MAX_BACKOFF_S, 2.0 ** (num_failures - 2))
