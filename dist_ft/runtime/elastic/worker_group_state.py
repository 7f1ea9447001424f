"""Keeps track of which workers run together, and carries out the decisions of the restart policy.

A generation is one life of all training processes of a run. Supervisors (one for each worker) join
the next generation; once all workers of a group have joined, each starts its process; when one
process fails, all stop and join the next generation. Guarantee: a supervisor whose group was
replaced cannot join again.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass, replace

from dist_ft.core.errors import WorkerError
from dist_ft.runtime.elastic.node_failures import (
    KNOWN_LOSS,
    UNKNOWN_LOSS,
    WorkerPlace,
    name_silent_workers,
)
from dist_ft.runtime.elastic.restart_policy import (
    AnnouncedLoss,
    Failure,
    FailureReport,
    GiveUp,
    Restart,
    RestartHistory,
    RestartPolicy,
    Wait,
)


@dataclass(frozen=True)
class Member:
    """A supervisor that joins.

    Attributes:
        group: id of the set of workers that were placed together.
        rank: its rank among the `num_ranks` workers of the group.
        node: its node, for messages.
        address: host:port where the process of rank 0 will listen; "" on other ranks.
    """

    group: str
    rank: int
    num_ranks: int
    node: str
    address: str


class WorkerGroupState:
    """Bookkeeping of one run. Times are seconds on any steady clock.

    Attributes:
        generation: number of the current generation.
        reason: why the generation before it ended; "" for the first.
        error: set once the run has been given up.
    """

    def __init__(self, policy: RestartPolicy) -> None:
        """Start without workers, before the first generation."""
        self.generation = 0
        self.reason = ""
        self.error: WorkerError | None = None
        self._policy = policy
        self._history = RestartHistory()
        self._group, self._num_ranks = "", 0

        # Of the running group: its members, and those that Ray reported as lost.
        self._group_members: dict[int, Member] = {}
        self._lost_ranks: tuple[int, ...] = ()

        # For good: a supervisor of a lost group may wake up long after it.
        self._replaced_groups: set[str] = set()

        # Of the current generation:
        self._members: dict[int, Member] = {}
        self._has_started = False
        self._reports: list[FailureReport] = []

    def join(self, member: Member, now_s: float) -> None:
        """Add `member` to the coming generation; a new group replaces the one before."""
        if self.is_replaced(member.group):
            return

        # Ray places all workers anew, never one: an unknown group means that the old one is gone.
        if self._group not in ("", member.group):
            self._replace_group(member, now_s)

        self._group, self._num_ranks = member.group, member.num_ranks
        self._members[member.rank] = self._group_members[member.rank] = member
        if len(self._members) == member.num_ranks:
            self._has_started = True

    def is_replaced(self, group: str) -> bool:
        """Return whether other workers took the place of this group."""
        return group in self._replaced_groups

    def rendezvous(self, now_s: float) -> str | None:
        """Return rank 0's address once all have joined and the backoff is over, else None."""
        if not self._is_complete() or now_s < self._history.start_at_s:
            return None
        return self._members[0].address

    def can_save(self, generation: int) -> bool:
        """Return whether `generation` trains: all workers have joined, and none has failed."""
        return generation == self.generation and self._is_complete() and not self._reports

    def announce_node_loss(self, description: str, event: str = AnnouncedLoss.event) -> None:
        """Note that nodes will be taken away: losing their workers is then no failure."""
        # The next generation too: the peers of a lost worker may fail before it is replaced.
        loss = AnnouncedLoss(description, self.generation + 1, event)
        self._history = replace(self._history, announced_loss=loss)

    def report_lost_workers(self, ranks: Sequence[int]) -> None:
        """Note which workers of the running group Ray lost; they are named when it is replaced."""
        self._lost_ranks = tuple(ranks)

    def workers_on(self, nodes: Container[str]) -> list[Member]:
        """Return the members of the running group on `nodes`, by rank."""
        members = [self._group_members[rank] for rank in sorted(self._group_members)]
        return [member for member in members if member.node in nodes]

    def report_failure(self, generation: int, failure: Failure, now_s: float) -> None:
        """Note that a process of `generation` failed; ignored if another generation runs."""
        if generation == self.generation:
            self._reports.append(FailureReport(failure, now_s))

    def report_progress(self) -> None:
        """Note a new checkpoint: it refills the budget of restarts."""
        self._history = replace(self._history, failures=())

    def check(self, now_s: float) -> Failure | None:
        """Start the next generation if this one failed; return the cause.

        Sets `error` if the policy gives up.
        """
        if not self._reports:
            return None

        reports = [self._with_silent_workers(report) for report in self._reports]
        decision = self._policy.on_failure(reports, self.generation, self._history, now_s)
        if isinstance(decision, Wait):
            return None

        self._apply(decision)
        return decision.cause

    def _with_silent_workers(self, report: FailureReport) -> FailureReport:
        """Return the report of a hang with the names of the workers that did not report."""
        if report.failure.kind != "hang":
            return report

        # If most are silent, they are late rather than stuck.
        reported = {other.failure.rank for other in self._reports}
        silent = [
            WorkerPlace(rank, self._members[rank].node)
            for rank in sorted(self._members)
            if rank not in reported
        ]
        if not silent or 2 * len(silent) > len(self._members):
            return report

        text = name_silent_workers(report.failure.text, silent)
        return replace(report, failure=replace(report.failure, text=text))

    def _is_complete(self) -> bool:
        first = self._members.get(0)
        return first is not None and len(self._members) == first.num_ranks

    def _replace_group(self, member: Member, now_s: float) -> None:
        self._replaced_groups.add(self._group)

        # If Ray did not report which worker was lost, the failure names the first new one.
        loss = Failure(member.rank, member.node, "lost", UNKNOWN_LOSS)
        for rank in reversed(self._lost_ranks):
            if rank in self._group_members:
                loss = Failure(rank, self._group_members[rank].node, "lost", KNOWN_LOSS)

        decision = self._policy.on_replacement(
            loss,
            is_larger=member.num_ranks > self._num_ranks,
            has_started=self._has_started,
            generation=self.generation,
            history=self._history,
            now_s=now_s,
        )
        self._group_members, self._lost_ranks = {}, ()
        self._apply(decision)

    def _apply(self, decision: Restart | GiveUp) -> None:
        self.reason = decision.reason
        self._history = decision.history
        if isinstance(decision, GiveUp):
            self.error = WorkerError(decision.message)

        # Also after giving up: supervisors notice by the number that their generation is over.
        self.generation += 1
        self._members, self._reports, self._has_started = {}, [], False
