"""Joins the driver and the supervisors of a run on Ray. Imports little, to start fast."""

from __future__ import annotations

import contextlib
import sys
import time
from collections import deque
from collections.abc import Sequence

from dist_ft.core.errors import DistFtError
from dist_ft.core.logs import redact
from dist_ft.core.printable import printable
from dist_ft.runtime.elastic.messages import (
    CommittedCheckpoint,
    LineKind,
    OutputLine,
    RunHealth,
    RunStatus,
)
from dist_ft.runtime.elastic.node_failures import NodeFailure, node_failures
from dist_ft.runtime.elastic.restart_policy import Failure, RestartPolicy
from dist_ft.runtime.elastic.worker_group_state import Member, WorkerGroupState
from dist_ft.training.console import Console
from dist_ft.training.result import Result

REPORT_INTERVAL_S = 15.0
"""Shortest time between two checkpoints that are reported to Ray: it collects reports every 2
seconds, and a worker waits until its report is collected."""
SILENT_S = 15.0
"""A rank 0 that has not called for this long will not save."""
DECIDE_S = 5.0
"""How long a restart waits for the driver's decision on a node that failed."""
MAX_LINES = 2000
"""Lines stored for the driver; older ones are dropped, and it learns their number."""


class Coordinator:
    """An actor between the driver and the supervisors.

    Lines and outcomes travel to the driver, stop and save requests to the supervisors.

    Reports of a group of workers that was replaced are ignored; `group` says who reports.
    """

    def __init__(self, max_failures: int = 0, exclude_node_after: int = 0) -> None:
        """Start without workers.

        Args:
            max_failures: cluster.max_failures.
            exclude_node_after: cluster.exclude_node_after; if not 0, the driver decides after each
                failure of a node, and the restart waits for it.
        """
        self._group_state = WorkerGroupState(RestartPolicy(max_failures))
        self._checkpoints: list[CommittedCheckpoint] = []
        self._latest: CommittedCheckpoint | None = None
        self._published_at = -REPORT_INTERVAL_S
        self._lines: deque[OutputLine] = deque(maxlen=MAX_LINES)
        self._num_dropped = 0
        self._rank_0_called_at: float | None = None
        self._outcome: Result | DistFtError | None = None
        self._stop = False
        self._num_signs = 0
        self._step: int | None = None

        # Failures of nodes that the driver has not taken, and the names of nodes that are left out.
        self._excludes = exclude_node_after > 0
        self._generation_seen = 0
        self._node_failures: list[NodeFailure] = []
        self._failed_at_s = 0.0
        self._left_out: frozenset[str] = frozenset()

        # Save requests are numbered from 1.
        self._save_number = 0
        self._save_done_number = 0
        self._save_generation = 0

    # For the driver

    def take_lines(self) -> list[OutputLine]:
        """Return the lines since the last call."""
        lines = list(self._lines)
        if self._num_dropped:
            # The oldest lines were dropped, so the gap is before all others.
            warning = f"WARNING {self._num_dropped} lines of worker output were dropped here"
            lines.insert(0, OutputLine("log", warning))

        self._lines.clear()
        self._num_dropped = 0
        return lines

    def outcome(self) -> Result | DistFtError | None:
        """Return what `end_run` noted."""
        return self._outcome

    def request_stop(self) -> None:
        """Have the workers save and exit."""
        self._stop = True

    def health(self) -> RunHealth:
        """Return what the driver watches."""
        state = self._group_state
        return RunHealth(state.generation, state.reason, self._num_signs, self._step)

    def take_node_failures(self) -> list[NodeFailure]:
        """Return the failures of nodes since the last call."""
        failures, self._node_failures = self._node_failures, []
        return failures

    def leave_out(self, nodes: Sequence[str]) -> None:
        """Have no workers on these nodes (by name) from the next placement on."""
        new_nodes = frozenset(nodes) - self._left_out
        self._left_out = frozenset(nodes)

        # Workers that are there now leave, which is no failure.
        members = self._group_state.workers_on(new_nodes)
        if members:
            names = ", ".join(f"worker {member.rank} on node {member.node}" for member in members)
            self._group_state.announce_node_loss(names, "is left out")

    def left_out(self) -> list[str]:
        """Return the names of the nodes that are left out."""
        return sorted(self._left_out)

    def rank_0_silent_s(self) -> float | None:
        """Return the seconds since rank 0's supervisor called; None: it never did."""
        if self._rank_0_called_at is None:
            return None
        return time.monotonic() - self._rank_0_called_at

    # For Ray Train's controller

    def request_save(self) -> int:
        """Have the workers save and continue; return the request's number for `is_save_done`."""
        self._save_number += 1

        # If that generation fails, nobody will answer: the next one starts from a checkpoint.
        self._save_generation = self._group_state.generation
        return self._save_number

    def is_save_done(self, number: int) -> bool:
        """Return whether request `number` is done, or no worker is left that could do it."""
        # Callers poll this before workers end, so each way in which no answer can come counts as
        # done: waiting longer would save nothing.
        silent_s = self.rank_0_silent_s()
        return (
            self._save_done_number >= number
            or self._outcome is not None
            or silent_s is None
            or silent_s > SILENT_S
            or not self._group_state.can_save(self._save_generation)
        )

    def announce_node_loss(self, description: str) -> None:
        """Note that nodes will be taken away: losing their workers is then no failure."""
        self._group_state.announce_node_loss(description)

    def report_lost_workers(self, ranks: Sequence[int]) -> None:
        """Note which workers Ray lost, before it replaces all."""
        self._group_state.report_lost_workers(ranks)

    # For the supervisors

    def join(self, member: Member, num_checkpoints: int) -> RunStatus:
        """Note that a supervisor is ready; the status has a `rendezvous` once all are."""
        self._group_state.join(member, time.monotonic())
        return self.status(member, num_checkpoints)

    def status(self, member: Member, num_checkpoints: int) -> RunStatus:
        """Return the status of the run, with the checkpoints after the first `num_checkpoints`.

        This is also the sign of life of a supervisor.
        """
        now_s = time.monotonic()

        # A replaced rank 0 may call until it notices; the driver waits for the new one.
        is_replaced = self._group_state.is_replaced(member.group)
        if member.rank == 0 and not is_replaced:
            self._rank_0_called_at = now_s

        # The actor has no timer of its own: it decides whenever a supervisor calls.
        failure = self._group_state.check(now_s)
        error = self._group_state.error
        if failure is not None:
            consequence = (
                "the run ends" if error else "all workers resume from the latest checkpoint"
            )
            self.add_line("log", f"WARNING {failure}; {consequence}")

        if error is not None:
            self.end_run(error)

        self._note_node_failures(now_s)
        rendezvous = self._group_state.rendezvous(now_s)
        if self._is_held(now_s):
            rendezvous = None

        return RunStatus(
            generation=self._group_state.generation,
            rendezvous=rendezvous,
            stop=self._stop,
            save_number=self._save_number,
            is_over=self._outcome is not None or is_replaced,
            reason=self._group_state.reason,
            checkpoints=tuple(self._checkpoints[num_checkpoints:]),
            must_leave=member.node in self._left_out,
        )

    def _note_node_failures(self, now_s: float) -> None:
        """Note the failures of nodes when a generation has ended."""
        state = self._group_state
        if not self._excludes or state.generation == self._generation_seen:
            return

        self._generation_seen = state.generation
        failures = node_failures(state.reason, time.time())
        if failures:
            self._node_failures.extend(failures)
            self._failed_at_s = now_s

    def _is_held(self, now_s: float) -> bool:
        """Return whether the next generation must not start yet."""
        # Those on a node that is left out are about to leave, and all are placed anew.
        if self._left_out and self._group_state.workers_on(self._left_out):
            return True
        return bool(self._node_failures) and now_s - self._failed_at_s < DECIDE_S

    def add_line(self, kind: LineKind, text: str) -> None:
        """Store a line for the driver."""
        self._num_dropped += len(self._lines) == MAX_LINES
        self._lines.append(OutputLine(kind, text))

    def end_run(self, outcome: Result | DistFtError, group: str = "") -> None:
        """Note how the run ended: a result, or an error that a restart would not cure.

        The first one counts.
        """
        if self._group_state.is_replaced(group):
            return

        # Now, whatever the interval: the last checkpoint is the one that Ray should know.
        self._publish_latest()
        self._outcome = self._outcome or outcome

    def report_failure(self, generation: int, failure: Failure) -> None:
        """Note why the process of a worker ended."""
        self._group_state.report_failure(generation, failure, time.monotonic())

    def report_save_done(self, number: int, group: str = "") -> None:
        """Note that all save requests up to `number` are done: saved, or the log says why not."""
        # One save answers all requests before it, and answers may arrive late.
        if not self._group_state.is_replaced(group):
            self._save_done_number = max(self._save_done_number, number)

    def num_checkpoints(self) -> int:
        """Return how many checkpoints were published to the supervisors so far."""
        return len(self._checkpoints)

    def report_checkpoint(self, url: str, metrics: dict[str, float], group: str = "") -> None:
        """Note a checkpoint; if they arrive faster than Ray collects reports, some are skipped."""
        if self._group_state.is_replaced(group):
            return

        self._num_signs += 1
        if "step" in metrics:
            self._step = int(metrics["step"])

        # Each checkpoint refills the budget of restarts, also one that Ray never hears of.
        self._group_state.report_progress()
        self._latest = CommittedCheckpoint(url, metrics)
        if time.monotonic() - self._published_at > REPORT_INTERVAL_S:
            self._publish_latest()

    def report_progress_sign(self, step: int | None, group: str = "") -> None:
        """Note that training progresses; `step`: the last one that is done, if any."""
        if not self._group_state.is_replaced(group):
            self._num_signs += 1
            self._step = step if step is not None else self._step

    def report_local_checkpoint(self, group: str = "") -> None:
        """Note a checkpoint on the workers' nodes, which is not reported to Ray."""
        if not self._group_state.is_replaced(group):
            self._num_signs += 1
            self._group_state.report_progress()

    def _publish_latest(self) -> None:
        if self._latest is not None:
            # The list only grows: supervisors count along it, so that all report the same ones.
            self._checkpoints.append(self._latest)
            self._latest, self._published_at = None, time.monotonic()


def print_lines(console: Console, lines: Sequence[OutputLine]) -> None:
    """Print console lines on the console and log lines on stderr, in their order."""
    for line in lines:
        if line.kind == "message":
            console.print(line.text)
        elif line.kind == "progress":
            console.show_progress(line.text)
        else:
            # End the progress line first, or the log line would continue it.
            console.close()
            with contextlib.suppress(OSError):
                print(printable(redact(line.text)), file=sys.stderr, flush=True)
