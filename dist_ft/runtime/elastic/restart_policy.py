"""Decides whether a run waits, restarts or gives up when workers fail or are replaced.

Pure: no clock, no side effects. `WorkerGroupState` carries the decisions out. The rules:

- Each failure costs one restart of the budget `cluster.max_failures`; a new checkpoint refills the
  budget.
- Restarts are spaced out: the first is immediate, later ones wait 1, 2, 4, ... seconds, at most
  `MAX_BACKOFF_S`.
- A failure that repeats exactly, without a new checkpoint in between, is not retried a third time.
  Ends by a signal count as repeated only on the same worker, `SIGNAL_REPEATS` times in succession;
  kills (SIGKILL, SIGTERM) never do.
- A worker whose peer vanished is not the cause: for `SETTLE_S` the policy waits for a report of the
  peer's own failure. An abort (SIGABRT) is treated alike, because NCCL's watchdog aborts healthy
  processes after the end of a peer or the timeout of a collective.
- Of several reports the cause is named by kind, then by time: other failures before aborts, and
  aborts before lost peers.
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
HANG_SETTLE_S = 2.0
"""How long to wait for the reports of all workers after a hang: who does not report may be the one
that the others waited for."""
MAX_BACKOFF_S = 60.0
"""Longest pause before a restart."""
REPEATABLE_KINDS = ("error", "out of memory", "crash")
"""A restart does not cure these if they repeat: code, data or config causes them."""
SIGNAL_REPEATS = 3
"""Ends by a signal, with the same text on the same worker, that count as a repeated failure."""
BY_SIGNAL = "by "
"""The text of an end by a signal: this, and the name of the signal."""
ABORT = "by SIGABRT"
"""Start of the text of an end by SIGABRT."""


@dataclass(frozen=True)
class Failure:
    """Why a generation ended: whose process failed, and how."""

    rank: int
    node: str
    kind: FailureKind
    text: str

    def __str__(self) -> str:
        return f"worker {self.rank} on node {self.node}: {self.kind} ({self.text})"

    @property
    def is_crash_by_signal(self) -> bool:
        """Whether the process ended itself by a signal, such as SIGSEGV."""
        return self.kind == "crash" and self.text.startswith(BY_SIGNAL)

    @property
    def is_abort(self) -> bool:
        """Whether the process ended itself by SIGABRT."""
        return self.kind == "crash" and self.text.startswith(ABORT)

    @property
    def may_be_consequence(self) -> bool:
        """Whether the end of another worker may explain this one."""
        return self.kind == "peer" or self.is_abort


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
        event: what happens to them.
    """

    description: str
    last_generation: int
    event: str = "was taken away, as announced"


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
        # A cause decides at once. What may be a consequence waits, from its report on.
        times_s = []
        for report in reports:
            times_s.append(report.at_s + settle_s(report.failure))

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
        if failures and failures[-1].may_be_consequence and not has_started:
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
            and (cause.kind == "lost" or cause.may_be_consequence)
        ):
            # After a peer's report the loss itself is still to come, so the announcement stays.
            pending = loss if cause.may_be_consequence else None
            reason = f"{PLANNED}{loss.description} {loss.event}"
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

        if is_repeated(failures):
            return (
                f"the same failure repeated without a new checkpoint in between ({cause}); "
                "another restart would not help; saved checkpoints are kept; fix the cause, "
                "then run the same command to resume"
            )
        return None


def settle_s(failure: Failure) -> float:
    """Return how long to wait for further reports after this one."""
    if failure.may_be_consequence:
        return SETTLE_S
    return HANG_SETTLE_S if failure.kind == "hang" else 0.0


def is_repeated(failures: Sequence[Failure]) -> bool:
    """Return whether the last of `failures`, oldest first, is one that a restart does not cure."""
    cause = failures[-1]
    if cause.kind not in REPEATABLE_KINDS:
        return False

    # A deterministic crash hits the same worker each time. Signals on changing workers come from
    # outside or from one another, and `max_failures` decides alone.
    if cause.is_crash_by_signal:
        latest = failures[-SIGNAL_REPEATS:]
        same = [failure for failure in latest if _is_same(failure, cause, with_rank=True)]
        return len(same) == SIGNAL_REPEATS

    # Not the rank: a fault in code or data may hit another worker each time.
    return len(failures) > 1 and _is_same(failures[-2], cause, with_rank=False)


def _is_same(failure: Failure, other: Failure, *, with_rank: bool) -> bool:
    is_same_rank = failure.rank == other.rank or not with_rank
    return is_same_rank and (failure.kind, failure.text) == (other.kind, other.text)


def find_cause(reports: Sequence[FailureReport]) -> Failure:
    """Return the failure that explains the others, of `reports` oldest first.

    An abort that another worker's report explains, or that may be explained so because several
    workers aborted, is returned as the loss of a peer.
    """
    cause = min(reports, key=_rank_of_report).failure  # the first of equal ones
    if not cause.is_abort:
        return cause

    # NCCL's watchdogs abort several processes at about the same time. Then no order says which of
    # them was the cause, if any.
    is_first = reports[0].failure.rank == cause.rank
    others = [report.failure for report in reports if report.failure.rank != cause.rank]
    if is_first and not any(failure.is_abort for failure in others):
        return cause
    return replace(cause, kind="peer", text=f"{cause.text}, as NCCL ends a worker without a peer")


def _rank_of_report(report: FailureReport) -> int:
    """Return the rank of a report among the possible causes; the lowest is the likeliest."""
    if report.failure.kind == "peer":
        return 2
    return 1 if report.failure.is_abort else 0


def backoff_s(num_failures: int) -> float:
    """Return the seconds until the next start; `num_failures`: since the last checkpoint."""
    if num_failures <= 1:
        return 0.0

    return min(MAX_BACKOFF_S, 2.0 ** (num_failures - 2))
