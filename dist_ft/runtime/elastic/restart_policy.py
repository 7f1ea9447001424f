"""Which training processes run together, and what follows when one fails. Pure bookkeeping; the relay keeps it.

A generation is one life of all training processes of a run. Supervisors (one a worker) meet; once all of a world have
come, each starts its process; when one of them fails, all stop, and meet again for the next generation. Guarantees: a
supervisor that was replaced is told so and can not come back; the budget of restarts is refilled by every checkpoint;
what failed twice in the same way without progress is not tried a third time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dist_ft.core.errors import PLANNED, WorkerError

Kind = Literal["killed", "crash", "hang", "out of memory", "storage", "peer", "error", "lost"]
SETTLE_S = 0.7
"""After news that only says a peer is gone, so long is waited for the peer's own."""
MOST_BACKOFF_S = 60.0
COMES_BACK = ("error", "out of memory", "crash")


@dataclass(frozen=True)
class Member:
    """A supervisor: the set of workers it is of, its rank among `size`, its node, where rank 0's process may listen.

    Attributes:
        group: the same for all workers that were placed together, and for no others.
    """

    group: str
    rank: int
    size: int
    node: str
    address: str


@dataclass(frozen=True)
class Failure:
    """Why a generation ended: whose process, and what is known about it."""

    rank: int
    node: str
    kind: Kind
    text: str

    def __str__(self) -> str:
        return f"worker {self.rank} on node {self.node}: {self.kind} ({self.text})"


@dataclass(frozen=True)
class View:
    """What a supervisor is told.

    Attributes:
        generation: the current one.
        rendezvous: host:port where its rank 0 listens; None: some are not here yet, or it is not time.
        stop: the user wants to stop.
        saves: how often a save was asked for since the run began.
        over: there is nothing left to do for this supervisor.
        after: why the generation before ended; "" for the first.
        commits: all (checkpoint URL, metrics) of the run so far that came after those asked for.
    """

    generation: int
    rendezvous: str | None = None
    stop: bool = False
    saves: int = 0
    over: bool = False
    after: str = ""
    commits: tuple[tuple[str, dict[str, float]], ...] = ()


class Generations:
    """The bookkeeping. Times are seconds on any steady clock."""

    def __init__(self, max_failures: int) -> None:
        """Take how many restarts are allowed without a new checkpoint in between; -1: without limit."""
        self.generation = 0
        self.after = ""
        self.error: WorkerError | None = None
        self._max_failures = max_failures
        self._members: dict[int, Member] = {}
        self._group, self._size, self._begun = "", 0, False
        self._replaced: set[str] = set()
        self._failures: list[Failure] = []
        self._reports: list[Failure] = []
        self._going = ("", 0)
        self._decide_at = 0.0
        self._not_before = 0.0

    def meet(self, member: Member, now: float) -> None:
        """Take `member` into the coming generation; the first of another set of workers replaces all there were."""
        if self.is_replaced(member.group):
            return
        if self._group not in ("", member.group):
            self._replace(member, now)
        self._group, self._size = member.group, member.size
        self._members[member.rank] = member
        self._begun |= len(self._members) == member.size

    def _replace(self, member: Member, now: float) -> None:
        """Another set of workers has come in place of the one there was."""
        self._replaced.add(self._group)
        if self._failures and self._failures[-1].kind == "peer" and not self._begun:
            self._failures.pop()  # the same loss, noticed by its peers first
        if self._size < member.size:  # a run that takes more nodes has lost nothing
            self.after = f"{PLANNED}more workers came"
        else:
            self._end(
                Failure(member.rank, member.node, "lost", "a worker or its node was lost"), now
            )
        self._next()

    def going(self, what: str) -> None:
        """Note that a node will be taken away: that its workers are lost then is no failure of the run."""
        self._going = (
            what,
            self.generation + 1,
        )  # the peers of a lost worker may fail first, and then be replaced

    def _end(self, why: Failure, now: float) -> None:
        """Note why this generation ends."""
        what, until = self._going
        if what and self.generation <= until and why.kind in ("lost", "peer"):
            self.after = f"{PLANNED}{what} was taken away, as announced"
            self._going = (what if why.kind == "peer" else "", until)
        else:
            self._count(why, now)

    def is_replaced(self, group: str) -> bool:
        """Tell whether other workers have the place of these."""
        return group in self._replaced

    def rendezvous(self, now: float) -> str | None:
        """Return where the current generation meets, once all are there."""
        first = self._members.get(0)
        if first is None or len(self._members) < first.size or now < self._not_before:
            return None
        return first.address

    def can_save(self, generation: int) -> bool:
        """Tell whether the processes of `generation` train: all have come, and none has failed."""
        first = self._members.get(0)
        return (
            generation == self.generation
            and first is not None
            and len(self._members) == first.size
            and not self._reports
        )

    def failed(self, generation: int, failure: Failure, now: float) -> None:
        """Note why a process of `generation` ended."""
        if generation != self.generation:
            return
        if not self._reports:
            self._decide_at = now + (SETTLE_S if failure.kind == "peer" else 0)
        elif failure.kind != "peer":
            self._decide_at = min(self._decide_at, now)
        self._reports.append(failure)

    def decide(self, now: float) -> Failure | None:
        """Begin the next generation if this one has failed, and return why; `error` is set if there will be none."""
        if not self._reports or now < self._decide_at:
            return None
        why = next((one for one in self._reports if one.kind != "peer"), self._reports[0])
        self._end(why, now)
        self._next()
        return why

    def _next(self) -> None:
        self._members, self._reports, self._begun = {}, [], False
        self.generation += 1

    def _count(self, why: Failure, now: float) -> None:
        """Note a failure; give up, or set the time of the next start."""
        self._failures.append(why)
        self.after = str(why)
        count = len(self._failures)
        self._not_before = now + backoff_s(count)
        kept = "what was committed is kept"
        last = [(one.kind, one.text) for one in self._failures[-2:]]
        if 0 <= self._max_failures < count:
            self.error = WorkerError(
                f"gave up after cluster.max_failures={self._max_failures} restarts without a new "
                f"checkpoint in between ({why}); {kept}; the same command goes on from there"
            )
        elif why.kind in COMES_BACK and last[1:] == last[:1]:
            self.error = WorkerError(
                f"the same failure came back without a new checkpoint in between ({why}); "
                f"starting again does not cure it; {kept}; mend the cause, and the same command "
                "goes on"
            )

    def progressed(self) -> None:
        """Note a new checkpoint: it refills the budget of restarts."""
        self._failures = []


def backoff_s(failures: int) -> float:
    """Return how long to wait before the next start after so many failures without progress: none after the first."""
    return 0.0 if failures <= 1 else min(MOST_BACKOFF_S, 2.0 ** (failures - 2))
