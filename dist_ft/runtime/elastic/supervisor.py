"""Supervises one worker's training process: starts it, notices its end, keeps a spare.

Runs in a Ray worker that never imports torch. Guarantees: whatever ends the process (exit, crash,
kill, a hang that its own watchdog or a peer's noticed), all supervisors of the run join again and
start the next generation from the latest checkpoint, without new placement by Ray; a supervisor
whose group was replaced ends its process and itself.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass

from dist_ft.config.schema import RunConfig
from dist_ft.core.errors import DistFtError, Interrupted, PeerError, StorageError
from dist_ft.core.world import World
from dist_ft.runtime.bootstrap.network_check import NODE
from dist_ft.runtime.bootstrap.rendezvous import free_port
from dist_ft.runtime.bootstrap.watchdog import EXIT_CODE as HUNG
from dist_ft.runtime.elastic.coordinator_client import CoordinatorClient
from dist_ft.runtime.elastic.messages import (
    CommittedCheckpoint,
    FirstStepsDone,
    LocalCheckpointCommitted,
    MetricsLine,
    OutputLine,
    ProcessExited,
    ProgressSign,
    RunStatus,
    SaveDone,
    TrainingCrashed,
    TrainingFailed,
    TrainingFinished,
    WorkerMessage,
)
from dist_ft.runtime.elastic.restart_policy import BY_SIGNAL, MAX_BACKOFF_S, Failure, FailureKind
from dist_ft.runtime.elastic.worker_group_state import Member
from dist_ft.runtime.elastic.worker_process import TrainingProcess

JOIN_POLL_S = 0.05
STATUS_POLL_S = 0.5
STATUS_CALLS_PER_S = 1000
"""Limit for all supervisors together, because the coordinator is one process."""
LAST_REPORTS_S = 20.0
LAST_LINES_S = 1.0
OOM_EVENTS = "/sys/fs/cgroup/memory.events"


class RendezvousTimeoutError(Exception):
    """The other supervisors of this worker's group did not join, and no other group replaced it."""


class NodeLeftOutError(Exception):
    """The node of this worker is left out from now on."""


@dataclass(frozen=True)
class WorkerContext:
    """Where a worker runs.

    Attributes:
        group: id of the set of workers that was placed together.
        world: its rank among them.
        node: its node's name, for messages.
        host: its node's address.
        device: index of its GPU on the node.
        spare_name: name under which a later worker of this run on this node finds the spare
            process, if this worker is lost.
    """

    group: str
    world: World
    node: str
    host: str
    device: int
    spare_name: str


class Supervisor:
    """The supervisor of one worker."""

    def __init__(
        self,
        config: RunConfig,
        context: WorkerContext,
        coordinator: CoordinatorClient,
        on_checkpoint: Callable[[str, dict[str, float]], None],
        on_metrics: Callable[[int, str, Mapping[str, float]], None] = lambda step, kind, values: (
            None
        ),
    ) -> None:
        """Create a supervisor; `run` starts processes.

        Args:
            config: the run.
            context: where this worker runs.
            coordinator: the run's coordinator.
            on_checkpoint: called with (URL, metrics) of every checkpoint of the run, in order, on
                every worker.
            on_metrics: called on rank 0 with (step, kind, values) of every line of metrics.
        """
        self._config = config
        self._context = context
        self._world = context.world
        self._coordinator = coordinator
        self._on_checkpoint = on_checkpoint
        self._on_metrics = on_metrics
        self._poll_s = max(STATUS_POLL_S, self._world.num_ranks / STATUS_CALLS_PER_S)
        self._num_checkpoints = 0
        self._is_stopping = False
        self._spare: TrainingProcess | None = None
        # A report of one worker waits for those of all, so it gets a thread.
        self._reporter = ThreadPoolExecutor(1, thread_name_prefix="reports")

    def run(self) -> None:
        """Supervise training processes until the run is over or this group is replaced."""
        # The workers before these reported older checkpoints to Ray.
        self._num_checkpoints = self._coordinator.num_checkpoints()
        try:
            while True:
                if self._spare is None:
                    self._spare = TrainingProcess.claim(self._context.spare_name)
                if self._spare is None:
                    self._spare = self._start_process()

                # The process imports while this waits for the other workers.
                member = self._new_member()
                status = self._join(member)
                if status.is_over:
                    return self._leave(status)

                process, self._spare = self._spare, None
                try:
                    is_over = self._supervise(process, member, status)
                finally:
                    # Its generation is over, and it may hang in a collective call with no peers.
                    process.kill()
                if is_over:
                    return self._leave(self._coordinator.status(member, self._num_checkpoints))
        finally:
            if self._spare is not None:
                self._spare.kill()
            self._reporter.shutdown(wait=False)

    def _start_process(self, modules: Sequence[str] = ()) -> TrainingProcess:
        return TrainingProcess.start(self._config, modules, self._context.spare_name)

    def _new_member(self) -> Member:
        """Return this supervisor as a member of the next generation; rank 0 gets a new port."""
        # A new port each time: the one of the last generation may be in use for a while.
        address = ""
        if self._world.rank == 0:
            address = f"{self._context.host}:{free_port(self._context.host)}"
        return Member(
            self._context.group,
            self._world.rank,
            self._world.num_ranks,
            self._context.node,
            address,
        )

    def _join(self, member: Member) -> RunStatus:
        """Wait until all workers have joined.

        Raises:
            RendezvousTimeoutError: it takes too long; Ray then places all workers anew.
            NodeLeftOutError: this node is left out; Ray then does so too.
        """
        # The coordinator holds the rendezvous back for the backoff, which is no delay of a worker.
        until = time.monotonic() + self._config.cluster.start_timeout_s + MAX_BACKOFF_S
        while True:
            status = self._coordinator.join(member, self._num_checkpoints)
            if status.is_over or status.rendezvous is not None:
                return status
            if status.must_leave:
                raise NodeLeftOutError(f"node {member.node} is left out")
            if time.monotonic() > until:
                raise RendezvousTimeoutError(
                    f"worker {member.rank} of {member.num_ranks}: the other workers did not join "
                    "in time"
                )
            time.sleep(JOIN_POLL_S)

    def _supervise(self, process: TrainingProcess, member: Member, status: RunStatus) -> bool:
        """Let `process` train until its generation ends; return whether the run is over here."""
        # Saves requested of an earlier generation are void: `save_number` starts at the latest.
        generation, save_number = status.generation, status.save_number
        has_ended = has_sent_stop = False
        oom_kills_before = _count_oom_kills()

        process.start_training(self._environment(status.rendezvous or ""), status.reason)

        while True:
            if not has_ended:
                # `receive` also sets the pace of this loop. `ProcessExited` comes after any other
                # last message, and only the first of the two counts.
                for message in process.receive(self._poll_s):
                    has_ended = has_ended or self._handle(message, generation, oom_kills_before)

            status = self._coordinator.status(member, self._num_checkpoints)
            if status.stop and not has_sent_stop:
                self._is_stopping = has_sent_stop = True
                process.request_stop()

            # The ranks agree among each other: a request to one makes all save, once.
            if status.save_number > save_number and self._world.rank == 0:
                save_number = status.save_number
                process.request_save(save_number)

            if status.is_over and not has_ended:
                self._forward_last_lines(process)
            self._report_checkpoints(status)
            if status.is_over or status.generation != generation:
                return status.is_over

            # The coordinator may still wait for the cause, or for rank 0 to end the run.
            if has_ended:
                time.sleep(JOIN_POLL_S)

    def _handle(self, message: WorkerMessage, generation: int, oom_kills_before: int) -> bool:
        """Act on a message of the process; return whether it was the last one."""
        # Checkpoints, saves and the result are the same on all ranks: rank 0 reports them, once.
        group, is_rank_0 = self._context.group, self._world.rank == 0
        match message:
            case OutputLine(kind, text):
                self._coordinator.add_line(kind, text)
            case FirstStepsDone(modules):
                if self._config.cluster.standby and self._spare is None:
                    with contextlib.suppress(OSError):  # then one is started when it is needed
                        self._spare = self._start_process(modules)
            case MetricsLine(step, kind, values):
                with contextlib.suppress(Exception):  # a display of metrics must not end a run
                    self._on_metrics(step, kind, values)
            case ProgressSign(step):
                if is_rank_0:
                    self._coordinator.report_progress_sign(step, group)
            case CommittedCheckpoint(url, metrics):
                if is_rank_0:
                    self._coordinator.report_checkpoint(url, metrics, group)
            case LocalCheckpointCommitted():
                if is_rank_0:
                    self._coordinator.report_local_checkpoint(group)
            case SaveDone(number):
                if is_rank_0:
                    self._coordinator.report_save_done(number, group)
            case TrainingFinished(result):
                if is_rank_0:
                    self._coordinator.end_run(result, group)
                return True
            case TrainingFailed(error) if self._ends_run(error):
                self._coordinator.end_run(error, group)
                return True
            case TrainingFailed() | TrainingCrashed() | ProcessExited():
                failure = self._failure_of(message, oom_kills_before)
                self._coordinator.report_failure(generation, failure)
                return True
        return False

    def _ends_run(self, error: DistFtError) -> bool:
        """Return whether a restart would not cure `error`; an unrequested stop gets one."""
        if isinstance(error, Interrupted):
            return self._is_stopping
        return not error.retryable

    def _failure_of(
        self, message: TrainingFailed | TrainingCrashed | ProcessExited, oom_kills_before: int
    ) -> Failure:
        kind: FailureKind
        match message:
            case TrainingFailed(Interrupted()):
                kind, text = "killed", "a worker received a stop signal; all saved"
            case TrainingFailed(error):
                kind, text = _kind_of(error), str(error)
            case TrainingCrashed(is_peer_loss, text):
                if is_peer_loss:
                    kind = "peer"
                elif text.startswith("out of"):
                    kind = "out of memory"
                else:
                    kind = "error"
            case ProcessExited(code):
                cause = explain_exit(code, _count_oom_kills() - oom_kills_before)
                kind, text = cause.kind, cause.text
        return Failure(self._world.rank, self._context.node, kind, text)

    def _forward_last_lines(self, process: TrainingProcess) -> None:
        """Forward what the process still prints after another worker reported the end."""
        until = time.monotonic() + LAST_LINES_S
        while time.monotonic() < until:
            for message in process.receive(0.1):
                if isinstance(message, OutputLine):
                    self._coordinator.add_line(message.kind, message.text)
                if isinstance(
                    message, TrainingFinished | TrainingFailed | TrainingCrashed | ProcessExited
                ):
                    return

    def _leave(self, status: RunStatus) -> None:
        """Report the last checkpoints; give up on it if Ray does not collect them in time."""
        self._report_checkpoints(status)

        # Reports run in their order on one thread, so an empty one behind them marks their end.
        wait([self._reporter.submit(lambda: None)], LAST_REPORTS_S)

    def _report_checkpoints(self, status: RunStatus) -> None:
        for checkpoint in status.checkpoints:
            self._num_checkpoints += 1
            self._reporter.submit(self._on_checkpoint, checkpoint.url, checkpoint.metrics)

    def _environment(self, rendezvous: str) -> dict[str, str]:
        """Return the variables that torchrun would set."""
        # LOCAL_RANK is the GPU's index, because torchrun's ranks choose their GPU by it.
        host, _, port = rendezvous.rpartition(":")
        return {
            "RANK": str(self._world.rank),
            "WORLD_SIZE": str(self._world.num_ranks),
            "LOCAL_RANK": str(self._context.device),
            "LOCAL_WORLD_SIZE": str(self._world.ranks_per_node),
            "MASTER_ADDR": host,
            "MASTER_PORT": port,
            NODE: self._context.node,
        }


@dataclass(frozen=True)
class ExitCause:
    """Why a process ended that sent no last message."""

    kind: FailureKind
    text: str


def explain_exit(code: int, num_oom_kills: int) -> ExitCause:
    """Return the cause of an exit code (negative: signal).

    Args:
        code: the exit code.
        num_oom_kills: processes that the kernel killed for lack of memory while this one ran.
    """
    if code == HUNG:  # from the watchdog's own timer; its fallback, faulthandler, exits with 1
        return ExitCause(
            "hang",
            "no progress within cluster.progress_timeout_s; its stacks are in attempts/ of the run",
        )
    if code == -signal.SIGKILL and num_oom_kills > 0:
        return ExitCause(
            "out of memory",
            "the kernel killed the process because memory ran out; use a machine with more memory, "
            "fewer workers per node, or a smaller batch.micro_batch",
        )
    if code == -signal.SIGKILL:
        return ExitCause("killed", "by SIGKILL, from outside")

    if code < 0:
        is_known = -code in list(signal.Signals)
        name = signal.Signals(-code).name if is_known else f"signal {-code}"
        is_stop = -code in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        return ExitCause("killed" if is_stop else "crash", f"{BY_SIGNAL}{name}")

    if code == 1:
        # `worker_process.main` sends Python errors as a last message, also those before training,
        # so this is faulthandler's exit.
        return ExitCause(
            "hang", "no progress within cluster.progress_timeout_s; its stacks are in its log"
        )
    return ExitCause("crash", f"the process ended with exit code {code}")


def _kind_of(error: DistFtError) -> FailureKind:
    if isinstance(error, StorageError):
        return "storage"
    if isinstance(error, PeerError):
        return "peer"
    return "error"


def _count_oom_kills() -> int:
    """Return the kernel's kills in this cgroup for lack of memory; 0 if unknown."""
    try:
        # Of cgroup v2. It exists in containers: the root cgroup of a host has no such file.
        with open(OOM_EVENTS) as file:
            for line in file:
                if line.startswith("oom_kill "):
                    return int(line.split()[1])
    except (OSError, ValueError):
        pass
    return 0
