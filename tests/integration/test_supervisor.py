"""Supervisors and the processes they look after, real ones, around a relay in this process: what Ray is not needed for."""

from __future__ import annotations

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
from dist_ft.runtime import supervisor
from dist_ft.runtime.process import Process
from dist_ft.runtime.relay import Relay
from dist_ft.runtime.supervisor import Place, Supervisor
from dist_ft.train.result import Result
from dist_ft.world import World

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

    def start(*values: Any) -> Process:
        found.append(Process(*values))
        return found[-1]

    monkeypatch.setattr(supervisor, "Process", start)
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


def supervise(document: dict[str, Any], size: int = 2, meanwhile: Callable[[Any], None] = lambda relay: None,
              ) -> tuple[Relay, list[tuple[int, str]]]:
    """Run a config under `size` supervisors to its end; return the relay and who was told of which checkpoint."""
    config, told = load_config(document), []
    relay = Called(Relay(config.cluster.max_failures))
    threads = []
    for rank in range(size):
        place = Place("group", World(rank, size, rank, size), "here", "127.0.0.1", rank)
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
        base: Path, unbroken: list[float], started: list[Process], monkeypatch: pytest.MonkeyPatch) -> None:
    document = tiny.config(base, "killed", workers=2)
    monkeypatch.setenv("DIST_FT_FAILPOINT", "train.step:11@1")
    monkeypatch.setenv("DIST_FT_FAILPOINT_ONCE", str(base / "killed-once"))
    relay, told = supervise(document)
    result = relay.outcome()
    assert isinstance(result, Result) and result.step == len(unbroken)
    assert history.losses(base / "runs/killed") == unbroken
    history.require_exactly_once(base / "runs/killed", document)
    assert any("worker 1 on node here: killed (by SIGKILL, from outside); all workers go on" in text
               for _, text in relay.take())
    notes = [json.loads(path.read_text()) for path in sorted((base / "runs/killed/attempts").glob("*.json"))]
    assert [note.get("after", "") for note in notes] == ["", "worker 1 on node here: killed (by SIGKILL, from outside)"]
    assert [url for rank, url in told if rank == 0] == [url for rank, url in told if rank == 1] != []
    assert told[-1][1] == result.checkpoint
    assert len(started) == 6, "two, two spares that took over, and two spares after them"
    require_gone(started)


def test_a_wish_to_save_goes_through_to_all_ranks_and_its_answer_comes_back(
        base: Path, unbroken: list[float], started: list[Process]) -> None:
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
    assert len(list(run.glob("*/manifest.json"))) == 2, "one for the wish of all ranks, and the last"
    assert history.losses(base / "runs/wish") == unbroken
    history.require_exactly_once(base / "runs/wish", document)
    require_gone(started)


def test_a_bug_that_comes_back_at_once_ends_the_run_in_one_line(
        base: Path, started: list[Process], monkeypatch: pytest.MonkeyPatch) -> None:
    document = tiny.config(base, "bug", workers=2, cluster={"standby": False})
    monkeypatch.setenv("DIST_FT_FAILPOINT", "train.step:3@0!raise")
    relay, _ = supervise(document)
    assert str(relay.outcome()) == (
        "the same failure came back without a new checkpoint in between (worker 0 on node here: error (failpoint)); "
        "starting again does not cure it; what was committed is kept; mend the cause, and the same command goes on")
    assert len(started) == 4
    require_gone(started)


def test_fault_20_too_little_memory_is_named_with_what_to_change_and_not_tried_for_ever(
        base: Path, started: list[Process], monkeypatch: pytest.MonkeyPatch) -> None:
    document = tiny.config(base, "memory", workers=2, cluster={"standby": False, "max_failures": 100})
    monkeypatch.setenv("DIST_FT_FAILPOINT", "train.step:3@1!memory")
    relay, _ = supervise(document)
    text = str(relay.outcome())
    assert "worker 1 on node here: out of memory (out of memory (MemoryError); use a machine with more, fewer workers" in text
    assert text.startswith("the same failure came back") and len(started) == 4
    require_gone(started)


def test_fault_7_a_signal_to_one_process_does_not_end_the_run(
        base: Path, unbroken: list[float], started: list[Process], monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is shut down without notice: all save, nobody asked the run to stop, and it goes on."""
    document = tiny.config(base, "signalled", workers=2, checkpoint={"every_steps": 0})
    monkeypatch.setenv("DIST_FT_FAILPOINT", "train.step:11@1!term")
    monkeypatch.setenv("DIST_FT_FAILPOINT_ONCE", str(base / "signalled-once"))
    relay, _ = supervise(document)
    assert isinstance(relay.outcome(), Result)
    assert history.losses(base / "runs/signalled") == unbroken
    history.require_exactly_once(base / "runs/signalled", document)
    said = [text for _, text in relay.take()]
    assert any("killed (a signal asked a worker to stop; all saved); all workers go on" in text for text in said)
    assert any("going on from step 11" in text for text in said), "no step was lost"


def test_fault_4_a_stopped_process_is_found_by_its_peers_and_killed(
        base: Path, unbroken: list[float], started: list[Process], monkeypatch: pytest.MonkeyPatch) -> None:
    document = tiny.config(base, "stopped", workers=2, cluster={"progress_timeout_s": 8})
    monkeypatch.setenv("DIST_FT_FAILPOINT", "train.step:11@1!stop")
    monkeypatch.setenv("DIST_FT_FAILPOINT_ONCE", str(base / "stopped-once"))
    relay, _ = supervise(document)
    assert history.losses(base / "runs/stopped") == unbroken
    assert any("worker 0 on node here: hang (no progress within cluster.progress_timeout_s" in text
               for _, text in relay.take())
    assert list((base / "runs/stopped/attempts").glob("*-rank-00000-stacks.txt"))
    require_gone(started)


def test_a_process_ends_with_its_supervisor(base: Path, tmp_path: Path) -> None:
    """Even one that is stopped and can not listen: the kernel sees to it."""
    program = ("import sys, time, yaml\nfrom dist_ft.config.load import load_config\n"
               "from dist_ft.runtime.process import Process\n"
               "if __name__ == '__main__':\n"
               "    print(Process(load_config(yaml.safe_load(sys.argv[1]))).pid, flush=True)\n    time.sleep(600)\n")
    parent = subprocess.Popen([sys.executable, "-c", program, json.dumps(tiny.config(base, "orphan", workers=2))],
                              stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    time.sleep(5)  # until it runs Python
    os.kill(pid, signal.SIGSTOP)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and Path(f"/proc/{pid}").exists() and "State:\tZ" not in Path(
            f"/proc/{pid}/status").read_text():
        time.sleep(0.1)
    assert not Path(f"/proc/{pid}").exists() or "State:\tZ" in Path(f"/proc/{pid}/status").read_text()
