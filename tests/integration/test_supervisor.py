"""Supervisors with real training processes, and a coordinator in this process: everything but Ray."""

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
from dist_ft.core.errors import LimitReached
from dist_ft.core.world import World
from dist_ft.runtime.elastic.coordinator import Coordinator
from dist_ft.runtime.elastic.messages import ProcessExited
from dist_ft.runtime.elastic.supervisor import Supervisor, WorkerContext
from dist_ft.runtime.elastic.worker_process import TrainingProcess
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
def started(monkeypatch: pytest.MonkeyPatch) -> list[TrainingProcess]:
    """Return all training processes that are started."""
    found: list[TrainingProcess] = []
    start = TrainingProcess.start

    def noted(*values: Any) -> TrainingProcess:
        found.append(start(*values))
        return found[-1]

    monkeypatch.setattr(TrainingProcess, "start", noted)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    return found


class LocalClient:
    """A coordinator that threads share like an actor: one call at a time."""

    def __init__(self, coordinator: Coordinator) -> None:
        self.target = coordinator
        self._lock = threading.Lock()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*values: Any) -> Any:
            with self._lock:
                return getattr(self.target, name)(*values)

        return call


def supervise(
    document: dict[str, Any],
    size: int = 2,
    meanwhile: Callable[[Any], None] = lambda coordinator: None,
    spares: str = "",
) -> tuple[Coordinator, list[tuple[int, str]]]:
    """Run a config under `size` supervisors; return the coordinator and (rank, reported
    checkpoint)."""
    config, reported = load_config(document), []
    client = LocalClient(Coordinator(config.cluster.max_failures))
    threads = []
    for rank in range(size):
        context = WorkerContext(
            "group", World(rank, size, rank, size), "here", "127.0.0.1", rank, spares
        )
        own = Supervisor(
            config, context, client, lambda url, _, rank=rank: reported.append((rank, url))
        )
        threads.append(threading.Thread(target=own.run, daemon=True))
        threads[-1].start()
    meanwhile(client)
    for thread in threads:
        thread.join(250)
    assert not any(thread.is_alive() for thread in threads), client.take_lines()
    return client.target, reported


def lines_of(coordinator: Coordinator) -> list[str]:
    return [line.text for line in coordinator.take_lines()]


def require_gone(started: list[TrainingProcess]) -> None:
    for process in started:
        with pytest.raises(ProcessLookupError):
            os.kill(process.pid, 0)


def test_fault_1_a_killed_process_is_replaced_by_the_spare_and_the_run_is_bit_exact(
    base: Path,
    unbroken: list[float],
    started: list[TrainingProcess],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    document = tiny.config(base, "killed", workers=2)
    monkeypatch.setenv("DIST_FT_FAILPOINT", "train.step:11@1")
    monkeypatch.setenv("DIST_FT_FAILPOINT_ONCE", str(base / "killed-once"))
    coordinator, reported = supervise(document)
    result = coordinator.outcome()
    assert isinstance(result, Result) and result.step == len(unbroken)
    assert history.losses(base / "runs/killed") == unbroken
    history.require_exactly_once(base / "runs/killed", document)
    assert any(
        "worker 1 on node here: killed (by SIGKILL, from outside); all workers resume" in text
        for text in lines_of(coordinator)
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
        [url for rank, url in reported if rank == 0]
        == [url for rank, url in reported if rank == 1]
        != []
    )
    assert reported[-1][1] == result.checkpoint
    assert len(started) == 6, "two, two spares that took over, and two spares after them"
    require_gone(started)


def test_save_request_reaches_all_ranks_and_is_answered(
    base: Path, unbroken: list[float], started: list[TrainingProcess]
) -> None:
    document = tiny.config(
        base, "request", workers=2, checkpoint={"every_steps": 0, "keep_last": 9}
    )
    run, saved = base / "runs/request/checkpoints", []

    def request_save(coordinator: Any) -> None:
        until = time.monotonic() + 120
        while (
            not any(line.kind == "progress" for line in coordinator.take_lines())
            and time.monotonic() < until
        ):
            time.sleep(0.02)
        number = coordinator.request_save()
        while not coordinator.is_save_done(number) and time.monotonic() < until:
            time.sleep(0.02)
        saved.extend(path.parent.name for path in run.glob("*/manifest.json"))

    coordinator, _ = supervise(document, meanwhile=request_save)
    assert isinstance(coordinator.outcome(), Result) and len(saved) == 1, saved
    assert 1 <= int(saved[0].split("-")[1]) < len(unbroken)
    assert len(list(run.glob("*/manifest.json"))) == 2, (
        "one for the request to all ranks, and the last"
    )
    assert history.losses(base / "runs/request") == unbroken
    history.require_exactly_once(base / "runs/request", document)
    require_gone(started)


def test_repeated_bug_ends_the_run_in_one_line(
    base: Path, started: list[TrainingProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    document = tiny.config(base, "bug", workers=2, cluster={"standby": False})
    monkeypatch.setenv("DIST_FT_FAILPOINT", "train.step:3@0!raise")
    coordinator, _ = supervise(document)
    assert str(coordinator.outcome()) == (
        "the same failure repeated without a new checkpoint in between (worker 0 on node here: "
        "error (failpoint)); another restart would not help; saved checkpoints are kept; fix the "
        "cause, then run the same command to resume"
    )
    assert len(started) == 4
    require_gone(started)


def ends(run: Path) -> list[str]:
    """Return why the attempts of a run ended, except the last."""
    notes = [json.loads(path.read_text()) for path in sorted((run / "attempts").glob("*.json"))]
    return [note.get("after", "") for note in notes[1:]]


@pytest.mark.slow
def test_fault_29_aborts_of_two_workers_are_no_reason_to_give_up(
    base: Path,
    unbroken: list[float],
    started: list[TrainingProcess],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """NCCL's watchdog aborts healthy processes: first one worker, then, without a checkpoint in
    between, the other."""
    document = tiny.config(base, "aborted", workers=2, checkpoint={"every_steps": 0})
    monkeypatch.setenv("DIST_FT_FAILPOINT", "train.step:3@0!abort;train.step:6@1!abort")
    monkeypatch.setenv("DIST_FT_FAILPOINT_ONCE", str(base / "aborted-once"))
    coordinator, _ = supervise(document)
    assert isinstance(coordinator.outcome(), Result), coordinator.outcome()
    assert history.losses(base / "runs/aborted") == unbroken
    history.require_exactly_once(base / "runs/aborted", document)
    first, second = ends(base / "runs/aborted")
    assert first.startswith("worker 0 ") and "by SIGABRT" in first
    assert second.startswith("worker 1 ") and "by SIGABRT" in second
    require_gone(started)


def test_fault_29_a_peer_that_aborts_after_a_death_is_not_the_cause(
    base: Path,
    unbroken: list[float],
    started: list[TrainingProcess],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    document = tiny.config(base, "consequence", workers=2, checkpoint={"every_steps": 0})
    # The death is noticed late, so the report of the abort comes first.
    monkeypatch.setenv("DIST_FT_FAILPOINT", "train.step:3@1;worker.peer_lost@0!abort")
    monkeypatch.setenv("DIST_FT_FAILPOINT_ONCE", str(base / "consequence-once"))
    handle = Supervisor._handle

    def handle_late(own: Supervisor, message: Any, *values: Any) -> bool:
        if isinstance(message, ProcessExited) and message.code == -signal.SIGKILL:
            time.sleep(0.3)
        return handle(own, message, *values)

    monkeypatch.setattr(Supervisor, "_handle", handle_late)
    coordinator, _ = supervise(document)
    assert isinstance(coordinator.outcome(), Result), coordinator.outcome()
    assert (base / "consequence-once.1").exists(), "the peer aborted"
    assert history.losses(base / "runs/consequence") == unbroken
    assert ends(base / "runs/consequence") == [
        "worker 1 on node here: killed (by SIGKILL, from outside)"
    ]
    require_gone(started)


@pytest.mark.slow
def test_two_workers_stop_at_the_same_step_when_the_run_reached_its_limit(
    base: Path, unbroken: list[float], started: list[TrainingProcess]
) -> None:
    """Rank 0 decides; the run resumes with a higher limit and is bit-equal."""
    run = base / "runs/limited"
    limited = tiny.config(base, "limited", workers=2, checkpoint={"every_steps": 0})
    limited["run"]["max_hours"] = 1e-7
    coordinator, _ = supervise(limited)
    outcome = coordinator.outcome()
    assert isinstance(outcome, LimitReached), outcome
    assert "stopped at step 1 of" in str(outcome) and "raise run.max_hours" in str(outcome)
    assert [path.parent.name for path in run.glob("checkpoints/*/manifest.json")] == [
        "step-000000001-a0001"
    ]

    again, _ = supervise(limited)
    assert isinstance(again.outcome(), LimitReached)
    assert "no step was trained now" in str(again.outcome()) and len(ends(run)) == 0
    limited["run"]["max_hours"] = 1.0
    last, _ = supervise(limited)
    assert isinstance(last.outcome(), Result), last.outcome()
    assert history.losses(run) == unbroken
    history.require_exactly_once(run, limited)
    require_gone(started)


def test_fault_20_too_little_memory_is_explained_and_not_retried_forever(
    base: Path, started: list[TrainingProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    document = tiny.config(
        base, "memory", workers=2, cluster={"standby": False, "max_failures": 100}
    )
    monkeypatch.setenv("DIST_FT_FAILPOINT", "train.step:3@1!memory")
    coordinator, _ = supervise(document)
    text = str(coordinator.outcome())
    assert (
        "worker 1 on node here: out of memory (out of memory (MemoryError). Use a machine with more memory, fewer workers"
        in text
    )
    assert text.startswith("the same failure repeated") and len(started) == 4
    require_gone(started)


def test_fault_7_a_signal_to_one_process_does_not_end_the_run(
    base: Path,
    unbroken: list[float],
    started: list[TrainingProcess],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A machine that is shut down without notice: all save, no stop was requested, and it resumes."""
    document = tiny.config(base, "signalled", workers=2, checkpoint={"every_steps": 0})
    monkeypatch.setenv("DIST_FT_FAILPOINT", "train.step:11@1!term")
    monkeypatch.setenv("DIST_FT_FAILPOINT_ONCE", str(base / "signalled-once"))
    coordinator, _ = supervise(document)
    assert isinstance(coordinator.outcome(), Result)
    assert history.losses(base / "runs/signalled") == unbroken
    history.require_exactly_once(base / "runs/signalled", document)
    lines = lines_of(coordinator)
    assert any(
        "killed (a worker received a stop signal; all saved); all workers resume" in text
        for text in lines
    )
    assert any("resuming from step 11" in text for text in lines), "no step was lost"


def test_fault_4_a_stopped_process_is_found_by_its_peers_and_killed(
    base: Path,
    unbroken: list[float],
    started: list[TrainingProcess],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    document = tiny.config(base, "stopped", workers=2, cluster={"progress_timeout_s": 8})
    monkeypatch.setenv("DIST_FT_FAILPOINT", "train.step:11@1!stop")
    monkeypatch.setenv("DIST_FT_FAILPOINT_ONCE", str(base / "stopped-once"))
    coordinator, _ = supervise(document)
    assert history.losses(base / "runs/stopped") == unbroken
    assert any(
        "worker 0 on node here: hang (no progress within cluster.progress_timeout_s" in text
        for text in lines_of(coordinator)
    )
    assert list((base / "runs/stopped/attempts").glob("*-rank-00000-stacks.txt"))
    require_gone(started)


LOST = """
import sys, time, yaml
from dist_ft.config.load import load_config
from dist_ft.runtime.elastic.worker_process import TrainingProcess
process = TrainingProcess.start(load_config(yaml.safe_load(sys.argv[1])), (), sys.argv[2])
if sys.argv[3] == "bound":
    process.start_training({}, "")
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


def test_process_ends_with_its_supervisor(base: Path) -> None:
    """Even one that is stopped and cannot receive messages: its keeper kills it."""
    assert ended(
        lose_a_worker(tiny.config(base, "orphan", workers=2), "orphan", "bound", stopped=True)
    )


def test_spare_of_a_lost_worker_is_claimed_once(
    base: Path, unbroken: list[float], started: list[TrainingProcess]
) -> None:
    document = tiny.config(base, "claimed", workers=2)
    pids = {lose_a_worker(document, "claimed", "spare") for _ in range(2)}
    config = load_config(document)
    assert TrainingProcess.claim("of another run or node") is None
    found = [TrainingProcess.claim("claimed"), TrainingProcess.claim("claimed")]
    assert {process.pid for process in found if process} == pids and TrainingProcess.claim(
        "claimed"
    ) is None
    for process in found:
        assert process is not None
        process.kill()
    assert all(ended(pid, 1) for pid in pids)

    pids = {lose_a_worker(document, "claimed", "spare") for _ in range(2)}
    coordinator, _ = supervise(
        {**document, "cluster": {**document["cluster"], "standby": False}}, spares="claimed"
    )
    assert isinstance(coordinator.outcome(), Result) and started == []
    assert history.losses(base / "runs/claimed") == unbroken
    assert all(ended(pid, 1) for pid in pids) and config.cluster.standby
