"""Supervisors and the processes they look after, real ones, around a relay in this process: what Ray is not needed for."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import history
import pytest
import ranks
import tiny

from dist_ft.config.load import load_config
from dist_ft.core.world import World
from dist_ft.runtime.elastic.coordinator import Relay
from dist_ft.runtime.elastic.supervisor import Place, Supervisor
from dist_ft.runtime.elastic.worker_process import Process
from dist_ft.training.result import Result

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.base(tmp_path_factory.mktemp("supervisor"))


@pytest.fixture(scope="module")
def unbroken(base: Path) -> list[float]:
    folder = base / "unbroken"
    ranks.require_ok(ranks.run_ranks(2, [tiny.config(base, "unbroken", workers=2)], folder), folder)
    return history.losses(base / "runs/unbroken")


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Process]:
    """Return all training processes that are started."""
    found: list[Process] = []
    start = Process.start

    def noted(*values: Any) -> Process:
        found.append(start(*values))
        return found[-1]

    monkeypatch.setattr(Process, "start", noted)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    return found


class Called:
    """A relay that threads share as an actor would be: one call at a time."""

    def __init__(self, relay: Relay) -> None:
        self.relay = relay
        self._lock = threading.Lock()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*values: Any) -> Any:
            with self._lock:
                return getattr(self.relay, name)(*values)

        return call


def supervise(
    document: dict[str, Any],
    size: int = 2,
    meanwhile: Callable[[Any], None] = lambda relay: None,
    spares: str = "",
) -> tuple[Relay, list[tuple[int, str]]]:
    """Run a config under `size` supervisors to its end; return the relay and who was told of which checkpoint."""
    config, told = load_config(document), []
    relay = Called(Relay(config.cluster.max_failures))
    threads = []
    for rank in range(size):
        place = Place("group", World(rank, size, rank, size), "here", "127.0.0.1", rank, spares)
        own = Supervisor(config, place, relay, lambda url, _, rank=rank: told.append((rank, url)))
        threads.append(threading.Thread(target=own.run, daemon=True))
        threads[-1].start()
    meanwhile(relay)
    for thread in threads:
        thread.join(250)
    assert not any(thread.is_alive() for thread in threads), relay.take()
    return relay.relay, told


def require_gone(started: list[Process]) -> None:
    for process in started:
        with pytest.raises(ProcessLookupError):
            os.kill(process.pid, 0)


def test_fault_1_a_killed_process_is_replaced_by_the_spare_and_the_run_is_bit_exact(
    base: Path, unbroken: list[float], started: list[Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    document = tiny.config(base, "killed", workers=2)
    monkeypatch.setenv("DIST_FT_FAILPOINT", "train.step:11@1")
    monkeypatch.setenv("DIST_FT_FAILPOINT_ONCE", str(base / "killed-once"))
    relay, told = supervise(document)
    result = relay.outcome()
    assert isinstance(result, Result) and result.step == len(unbroken)
    assert history.losses(base / "runs/killed") == unbroken
    history.require_exactly_once(base / "runs/killed", document)
    assert any(
        "worker 1 on node here: killed (by SIGKILL, from outside); all workers go on" in text
        for _, text in relay.take()
    )
    notes = [
        json.loads(path.read_text())
        for path in sorted((base / "runs/killed/attempts").glob("*.json"))
    ]
    assert [note.get("after", "") for note in notes] == [
        "",
        "worker 1 on node here: killed (by SIGKILL, from outside)",
    ]
    assert (
        [url for rank, url in told if rank == 0] == [url for rank, url in told if rank == 1] != []
    )
    assert told[-1][1] == result.checkpoint
    assert len(started) == 6, "two, two spares that took over, and two spares after them"
    require_gone(started)


def test_a_wish_to_save_goes_through_to_all_ranks_and_its_answer_comes_back(
    base: Path, unbroken: list[float], started: list[Process]
) -> None:
    document = tiny.config(base, "wish", workers=2, checkpoint={"every_steps": 0, "keep_last": 9})
    run, there = base / "runs/wish/checkpoints", []

    def ask(relay: Any) -> None:
        until = time.monotonic() + 120
        while not any(kind == "progress" for kind, _ in relay.take()) and time.monotonic() < until:
            time.sleep(0.02)
        number = relay.save()
        while not relay.is_saved(number) and time.monotonic() < until:
            time.sleep(0.02)
        there.extend(path.parent.name for path in run.glob("*/manifest.json"))

    relay, _ = supervise(document, meanwhile=ask)
    assert isinstance(relay.outcome(), Result) and len(there) == 1, there
    assert 1 <= int(there[0].split("-")[1]) < len(unbroken)
    assert len(list(run.glob("*/manifest.json"))) == 2, (
        "one for the wish of all ranks, and the last"
    )
    assert history.losses(base / "runs/wish") == unbroken
    history.require_exactly_once(base / "runs/wish", document)
    require_gone(started)


def test_a_bug_that_comes_back_at_once_ends_the_run_in_one_line(
    base: Path, started: list[Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    document = tiny.config(base, "bug", workers=2, cluster={"standby": False})
    monkeypatch.setenv("DIST_FT_FAILPOINT", "train.step:3@0!raise")
    relay, _ = supervise(document)
    assert str(relay.outcome()) == (
        "the same failure came back without a new checkpoint in between (worker 0 on node here: error (failpoint)); "
        "starting again does not cure it; what was committed is kept; mend the cause, and the same command goes on"
    )
    assert len(started) == 4
    require_gone(started)


def test_fault_20_too_little_memory_is_named_with_what_to_change_and_not_tried_for_ever(
    base: Path, started: list[Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    document = tiny.config(
        base, "memory", workers=2, cluster={"standby": False, "max_failures": 100}
    )
    monkeypatch.setenv("DIST_FT_FAILPOINT", "train.step:3@1!memory")
    relay, _ = supervise(document)
    text = str(relay.outcome())
    assert (
        "worker 1 on node here: out of memory (out of memory (MemoryError); use a machine with more, fewer workers"
        in text
    )
    assert text.startswith("the same failure came back") and len(started) == 4
    require_gone(started)


def test_fault_7_a_signal_to_one_process_does_not_end_the_run(
    base: Path, unbroken: list[float], started: list[Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that is shut down without notice: all save, nobody asked the run to stop, and it goes on."""
    document = tiny.config(base, "signalled", workers=2, checkpoint={"every_steps": 0})
    monkeypatch.setenv("DIST_FT_FAILPOINT", "train.step:11@1!term")
    monkeypatch.setenv("DIST_FT_FAILPOINT_ONCE", str(base / "signalled-once"))
    relay, _ = supervise(document)
    assert isinstance(relay.outcome(), Result)
    assert history.losses(base / "runs/signalled") == unbroken
    history.require_exactly_once(base / "runs/signalled", document)
    said = [text for _, text in relay.take()]
    assert any(
        "killed (a signal asked a worker to stop; all saved); all workers go on" in text
        for text in said
    )
    assert any("going on from step 11" in text for text in said), "no step was lost"


def test_fault_4_a_stopped_process_is_found_by_its_peers_and_killed(
    base: Path, unbroken: list[float], started: list[Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    document = tiny.config(base, "stopped", workers=2, cluster={"progress_timeout_s": 8})
    monkeypatch.setenv("DIST_FT_FAILPOINT", "train.step:11@1!stop")
    monkeypatch.setenv("DIST_FT_FAILPOINT_ONCE", str(base / "stopped-once"))
    relay, _ = supervise(document)
    assert history.losses(base / "runs/stopped") == unbroken
    assert any(
        "worker 0 on node here: hang (no progress within cluster.progress_timeout_s" in text
        for _, text in relay.take()
    )
    assert list((base / "runs/stopped/attempts").glob("*-rank-00000-stacks.txt"))
    require_gone(started)


LOST = """
import sys, time, yaml
from dist_ft.config.load import load_config
from dist_ft.runtime.elastic.worker_process import Process
process = Process.start(load_config(yaml.safe_load(sys.argv[1])), (), sys.argv[2])
if sys.argv[3] == "begun":
    process.begin({}, "")
print(process.pid, flush=True)
time.sleep(600)
"""


def lose_a_worker(document: dict[str, Any], spares: str, state: str, stopped: bool = False) -> int:
    """Kill a worker that has a process; return the process's id."""
    worker = subprocess.Popen(
        [sys.executable, "-c", LOST, json.dumps(document), spares, state],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert worker.stdout is not None
    pid = int(worker.stdout.readline())
    if stopped:
        time.sleep(5)  # until it runs Python
        os.kill(pid, signal.SIGSTOP)
    worker.kill()
    worker.wait()
    return pid


def ended(pid: int, within_s: float = 10) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if "State:\tZ" not in Path(f"/proc/{pid}/status").read_text():
                time.sleep(0.1)
                continue
        return True
    return False


def test_a_process_ends_with_its_supervisor(base: Path) -> None:
    """Even one that is stopped and can not listen: its keeper sees to it."""
    assert ended(
        lose_a_worker(tiny.config(base, "orphan", workers=2), "orphan", "begun", stopped=True)
    )


def test_the_spare_of_a_lost_worker_serves_the_next_one_once(
    base: Path, unbroken: list[float], started: list[Process]
) -> None:
    document = tiny.config(base, "claimed", workers=2)
    pids = {lose_a_worker(document, "claimed", "spare") for _ in range(2)}
    config = load_config(document)
    assert Process.claim("of another run or node") is None
    found = [Process.claim("claimed"), Process.claim("claimed")]
    assert {process.pid for process in found if process} == pids and Process.claim(
        "claimed"
    ) is None
    for process in found:
        assert process is not None
        process.end()
    assert all(ended(pid, 1) for pid in pids)

    pids = {lose_a_worker(document, "claimed", "spare") for _ in range(2)}
    relay, _ = supervise(
        {**document, "cluster": {**document["cluster"], "standby": False}}, spares="claimed"
    )
    assert isinstance(relay.outcome(), Result) and started == []
    assert history.losses(base / "runs/claimed") == unbroken
    assert all(ended(pid, 1) for pid in pids) and config.cluster.standby
