"""What passes between the driver and the supervisors of a run on Ray. Light: its actor must start fast."""

from __future__ import annotations

import contextlib
import sys
import time
from collections import deque
from collections.abc import Sequence

from dist_ft.core.errors import DistFtError
from dist_ft.core.logs import redact
from dist_ft.runtime.elastic.restart_policy import Failure, Generations, Member, View
from dist_ft.training.console import Console
from dist_ft.training.result import Result

REPORT_EVERY_S = 15.0
"""Ray takes a report of each worker every 2 seconds, and a worker waits until it is taken."""
SILENT_S = 15.0
"""A rank 0 that was not heard of for so long will not save."""
MOST_LINES = 2000
"""Held for a driver that does not fetch them; older ones are left out, and it is told how many."""


class Relay:
    """An actor between driver and supervisors: lines and outcomes one way, wishes to stop or save the other."""

    def __init__(self, max_failures: int = 0) -> None:
        self._generations = Generations(max_failures)
        self._commits: list[tuple[str, dict[str, float]]] = []
        self._newest: tuple[str, dict[str, float]] | None = None
        self._passed_on_at = -REPORT_EVERY_S
        self._lines: deque[tuple[str, str]] = deque(maxlen=MOST_LINES)
        self._num_left_out = 0
        self._heard_at: float | None = None
        self._outcome: Result | DistFtError | None = None
        self._stop = False
        self._saves = self._saves_done = self._saves_of = 0

    def put(self, kind: str, text: str) -> None:
        """Take a line (`kind` is "say" or "progress" of rank 0's console, or "log" of any rank)."""
        self._num_left_out += len(self._lines) == MOST_LINES
        self._lines.append((kind, text))

    def take(self) -> list[tuple[str, str]]:
        """Return the lines since the last call."""
        lines = [
            ("log", f"WARNING {self._num_left_out} lines of the workers are left out here")
        ] * bool(self._num_left_out) + list(self._lines)
        self._lines.clear()
        self._num_left_out = 0
        return lines

    def end(self, outcome: Result | DistFtError, group: str = "") -> None:
        """Note how the run ended: a result, or an error that starting again would not cure.

        `group`: whose word this is; that of workers which were replaced counts nothing, here as in the calls below.
        """
        if self._generations.is_replaced(group):
            return
        self._pass_on()
        self._outcome = self._outcome or outcome

    def outcome(self) -> Result | DistFtError | None:
        """Return what `end` noted."""
        return self._outcome

    def stop(self) -> None:
        """Ask the workers to save and leave."""
        self._stop = True

    def save(self) -> int:
        """Ask the workers to save now and train on; return the number of this wish, for `is_saved`."""
        self._saves += 1
        self._saves_of = self._generations.generation
        return self._saves

    def going(self, what: str) -> None:
        """Note that a node will be taken away: that is why the workers after these come."""
        self._generations.going(what)

    def saved(self, number: int, group: str = "") -> None:
        """Note that all wishes up to `number` are answered: saved, or the log says why not."""
        if not self._generations.is_replaced(group):
            self._saves_done = max(self._saves_done, number)

    def is_saved(self, number: int) -> bool:
        """Tell whether wish `number` is answered, or nobody is there who could."""
        silent_s = self.silent_s()
        return (
            self._saves_done >= number
            or self._outcome is not None
            or silent_s is None
            or silent_s > SILENT_S
            or not self._generations.can_save(self._saves_of)
        )

    def meet(self, member: Member, num_commits: int) -> View:
        """Say that this supervisor is ready for the coming generation; its `rendezvous` is there once all are."""
        self._generations.meet(member, time.monotonic())
        return self.look(member, num_commits)

    def look(self, member: Member, num_commits: int) -> View:
        """Tell a supervisor that lives how things stand, and the commits after the first `num_commits`."""
        now = time.monotonic()
        if member.rank == 0 and not self._generations.is_replaced(member.group):
            self._heard_at = now
        failure = self._generations.decide(now)
        if failure is not None:
            self.put(
                "log",
                f"WARNING {failure}; "
                + (
                    "the run ends"
                    if self._generations.error
                    else "all workers go on from the newest checkpoint"
                ),
            )
        if self._generations.error is not None:
            self.end(self._generations.error)
        return View(
            self._generations.generation,
            self._generations.rendezvous(now),
            self._stop,
            self._saves,
            self._outcome is not None or self._generations.is_replaced(member.group),
            self._generations.after,
            tuple(self._commits[num_commits:]),
        )

    def failed(self, generation: int, failure: Failure) -> None:
        """Note why the process of a worker ended."""
        self._generations.failed(generation, failure, time.monotonic())

    def num_commits(self) -> int:
        """Return how many checkpoints were passed on so far."""
        return len(self._commits)

    def committed(self, url: str, metrics: dict[str, float], group: str = "") -> None:
        """Note a checkpoint. Of those that come faster than Ray takes reports, some are not passed on."""
        if self._generations.is_replaced(group):
            return
        self._generations.progressed()
        self._newest = (url, metrics)
        if time.monotonic() - self._passed_on_at > REPORT_EVERY_S:
            self._pass_on()

    def progressed(self, group: str = "") -> None:
        """Note a checkpoint that Ray is not told of: it lies on the workers' nodes."""
        if not self._generations.is_replaced(group):
            self._generations.progressed()

    def _pass_on(self) -> None:
        if self._newest is not None:
            self._commits.append(self._newest)
            self._newest, self._passed_on_at = None, time.monotonic()

    def silent_s(self) -> float | None:
        """Return the seconds since rank 0 was last heard of; None: never."""
        return None if self._heard_at is None else time.monotonic() - self._heard_at


def show(console: Console, lines: Sequence[tuple[str, str]]) -> None:
    """Show what `Relay.take` returned: console lines on the console, log lines on stderr, in their order."""
    for kind, text in lines:
        if kind != "log":
            getattr(console, kind)(text)
            continue
        console.close()
        with contextlib.suppress(OSError):
            print(redact(text), file=sys.stderr, flush=True)
