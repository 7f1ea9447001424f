"""Looks after one worker's training process: starts it with its peers', sees how it ends, has a spare ready.

Runs in a Ray worker that never imports torch. Guarantees: whatever the process does (exit, crash, kill, hang noticed by
its watchdog or a peer's), all supervisors of the run meet again and start the next generation from the newest
checkpoint, without Ray having to place anything anew; a supervisor that was replaced ends its process and itself.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, Protocol

from dist_ft.config.schema import RunConfig
from dist_ft.core.errors import DistFtError, Interrupted, PeerError, StorageError
from dist_ft.core.world import World
from dist_ft.runtime.bootstrap.network_check import NODE
from dist_ft.runtime.bootstrap.watchdog import EXIT_CODE as HUNG
from dist_ft.runtime.elastic.restart_policy import MOST_BACKOFF_S, Failure, Kind, Member, View
from dist_ft.runtime.elastic.worker_process import Process

MEET_S, LOOK_S = 0.05, 0.5
LOOKS_PER_S = 1000
"""Of all supervisors together: the relay is one process. News of one's own process is passed on at once."""
REPORTS_S = 20.0
OOM_EVENTS = "/sys/fs/cgroup/memory.events"


class RendezvousTimeoutError(Exception):
    """The other supervisors of this worker's group are not there, and no other group has come in its place."""


class RelayLike(Protocol):
    """The relay as a supervisor calls it."""

    def meet(self, member: Member, num_commits: int) -> View: ...  # noqa: D102
    def look(self, member: Member, num_commits: int) -> View: ...  # noqa: D102
    def failed(self, generation: int, failure: Failure) -> None: ...  # noqa: D102
    def num_commits(self) -> int: ...  # noqa: D102
    def committed(self, url: str, metrics: dict[str, float], group: str) -> None: ...  # noqa: D102
    def progressed(self, group: str) -> None: ...  # noqa: D102
    def saved(self, number: int, group: str) -> None: ...  # noqa: D102
    def put(self, kind: str, text: str) -> None: ...  # noqa: D102
    def end(self, outcome: Any, group: str) -> None: ...  # noqa: D102


@dataclass(frozen=True)
class Place:
    """Where this worker is: who was placed with it, its world, its node's name and address, its device there.

    spares: the name under which a worker of this run on this node leaves its spare process, if it is lost.
    """

    group: str
    world: World
    node: str
    host: str
    device: int
    spares: str


class Supervisor:
    """One worker's."""

    def __init__(
        self,
        config: RunConfig,
        place: Place,
        relay: RelayLike,
        committed: Callable[[str, dict[str, float]], None],
        measured: Callable[[int, str, dict[str, float]], None] = lambda step, kind, values: None,
    ) -> None:
        """Assign only. `committed` is called for every checkpoint of the run, in order, on every worker.

        `measured`: with (step, kind, values) of every line of metrics, on rank 0's.
        """
        self._config = config
        self._place = place
        self._relay = relay
        self._committed = committed
        self._measured = measured
        self._look_s = max(LOOK_S, place.world.num_ranks / LOOKS_PER_S)
        self._num_commits = 0
        self._stopping = False
        self._spare: Process | None = None
        self._reports = ThreadPoolExecutor(
            1, thread_name_prefix="reports"
        )  # a report waits for those of all workers

    def run(self) -> None:
        """Look after training processes until the run is over or this supervisor is replaced."""
        self._num_commits = (
            self._relay.num_commits()
        )  # older ones were told of by the workers before these
        try:
            while True:
                self._spare = (
                    self._spare or Process.claim(self._place.spares) or self._new_process()
                )
                member, view = self._meet()
                if view.over:
                    return self._leave(view)
                process, self._spare = self._spare, None
                try:
                    over = self._watch(process, member, view)
                finally:
                    process.end()
                if over:
                    return self._leave(self._relay.look(member, self._num_commits))
        finally:
            if self._spare is not None:
                self._spare.end()
            self._reports.shutdown(wait=False)

    def _new_process(self, modules: Sequence[str] = ()) -> Process:
        return Process.start(self._config, modules, self._place.spares)

    def _meet(self) -> tuple[Member, View]:
        """Wait for the others; raises RendezvousTimeoutError if it takes too long: Ray then places all anew."""
        world, until = (
            self._place.world,
            time.monotonic() + self._config.cluster.start_timeout_s + MOST_BACKOFF_S,
        )
        member = Member(
            self._place.group,
            world.rank,
            world.num_ranks,
            self._place.node,
            f"{self._place.host}:{_free_port()}" if world.rank == 0 else "",
        )
        while True:
            view = self._relay.meet(member, self._num_commits)
            if view.over or view.rendezvous is not None:
                return member, view
            if time.monotonic() > until:
                raise RendezvousTimeoutError(
                    f"worker {world.rank} of {world.num_ranks} waited in vain for the others"
                )
            time.sleep(MEET_S)

    def _watch(self, process: Process, member: Member, view: View) -> bool:
        """Let `process` train; return whether there is nothing more to do."""
        generation, ended, told, saves = view.generation, False, False, view.saves
        oom_kills = _oom_kills()
        process.begin(self._environment(view.rendezvous or ""), view.after)
        while True:
            for message in [] if ended else process.messages(self._look_s):
                ended = ended or self._take(message, generation, oom_kills)
            view = self._relay.look(member, self._num_commits)
            if view.stop and not told:
                self._stopping = told = True
                process.stop()
            if (
                view.saves > saves and self._place.world.rank == 0
            ):  # what one rank is asked for all do, once
                saves = view.saves
                process.save(saves)
            if view.over and not ended:
                self._drain(process)
            self._report(view)
            if view.over or view.generation != generation:
                return view.over
            if ended:
                time.sleep(MEET_S)

    def _take(self, message: tuple[Any, ...], generation: int, oom_kills: int) -> bool:
        """Act on a message of the process; return whether it has ended."""
        kind, *rest = message
        if kind == "line":
            self._relay.put(*rest)
        elif kind == "begun":
            if self._config.cluster.standby and self._spare is None:
                with contextlib.suppress(OSError):  # one is started when it is needed
                    self._spare = self._new_process(*rest)
        elif kind == "measured":
            with contextlib.suppress(Exception):  # it is for people who watch, never worth a run
                self._measured(*rest)
        elif kind in ("committed", "progressed", "saved"):
            if self._place.world.rank == 0:
                getattr(self._relay, kind)(*rest, self._place.group)
        elif kind == "result":
            if self._place.world.rank == 0:
                self._relay.end(rest[0], self._place.group)
            return True
        else:
            self._relay_failure(kind, rest, generation, oom_kills)
            return True
        return False

    def _relay_failure(self, kind: str, rest: list[Any], generation: int, oom_kills: int) -> None:
        """Tell all how the process ended, if it was not with a result."""
        place = self._place
        if kind == "error" and isinstance(rest[0], Interrupted) and not self._stopping:
            failure = Failure(
                place.world.rank, place.node, "killed", "a signal asked a worker to stop; all saved"
            )
        elif kind == "error" and (isinstance(rest[0], Interrupted) or not rest[0].retryable):
            return self._relay.end(rest[0], place.group)
        elif kind == "error":
            failure = Failure(place.world.rank, place.node, _kind_of(rest[0]), str(rest[0]))
        elif kind == "failed":
            is_peer, text = rest
            named: Kind = "out of memory" if text.startswith("out of") else "error"
            failure = Failure(place.world.rank, place.node, "peer" if is_peer else named, text)
        else:
            failure = Failure(
                place.world.rank, place.node, *how_it_ended(rest[0], _oom_kills() - oom_kills)
            )
        return self._relay.failed(generation, failure)

    def _drain(self, process: Process) -> None:
        """Show what the process still says in a moment: others have told the end of the run."""
        until = time.monotonic() + 1.0
        while time.monotonic() < until:
            for message in process.messages(0.1):
                if message[0] == "line":
                    self._relay.put(*message[1:])
                if message[0] in ("gone", "result", "error", "failed"):
                    return

    def _leave(self, view: View) -> None:
        """Hand the last reports over, unless Ray does not take them."""
        self._report(view)
        wait([self._reports.submit(lambda: None)], REPORTS_S)

    def _report(self, view: View) -> None:
        for url, metrics in view.commits:
            self._num_commits += 1
            self._reports.submit(self._committed, url, metrics)

    def _environment(self, rendezvous: str) -> dict[str, str]:
        """Return what torchrun would set."""
        world, (host, _, port) = self._place.world, rendezvous.rpartition(":")
        return {
            "RANK": str(world.rank),
            "WORLD_SIZE": str(world.num_ranks),
            "LOCAL_RANK": str(self._place.device),
            "LOCAL_WORLD_SIZE": str(world.ranks_per_node),
            "MASTER_ADDR": host,
            "MASTER_PORT": port,
            NODE: self._place.node,
        }


def how_it_ended(code: int, oom_kills: int) -> tuple[Kind, str]:
    """Return the kind and the text of an end without a word, by exit code (negative: signal)."""
    if code == HUNG:  # the watchdog's first clock; its second one, faulthandler, ends with 1
        return (
            "hang",
            "no progress within cluster.progress_timeout_s; its stacks lie in attempts/ of the run",
        )
    if code == -signal.SIGKILL and oom_kills > 0:
        return "out of memory", (
            "the kernel killed the process for want of memory; use a machine with more, fewer "
            "workers on it, or a smaller batch.micro_batch"
        )
    if code == -signal.SIGKILL:
        return "killed", "by SIGKILL, from outside"
    if code < 0:
        name = signal.Signals(-code).name if -code in list(signal.Signals) else f"signal {-code}"
        return (
            "killed" if -code in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP) else "crash"
        ), f"by {name}"
    if code == 1:
        return "hang", "no progress within cluster.progress_timeout_s; its stacks are in its log"
    return "crash", f"the process ended with exit code {code}"


def _kind_of(error: DistFtError) -> Kind:
    return (
        "storage"
        if isinstance(error, StorageError)
        else "peer"
        if isinstance(error, PeerError)
        else "error"
    )


def _oom_kills() -> int:
    """Return how often the kernel has killed in this cgroup for want of memory; 0 where it does not say."""
    try:
        with open(OOM_EVENTS) as file:
            return next((int(line.split()[1]) for line in file if line.startswith("oom_kill ")), 0)
    except (OSError, ValueError):
        return 0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]
