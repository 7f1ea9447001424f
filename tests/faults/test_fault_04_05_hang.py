"""Faults 4 and 5 on two real ranks: a stopped rank, an interpreter lock that is never released,
a segfault."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import history
import pytest
import ranks
import tiny

TIMEOUT_S = 4


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.base(tmp_path_factory.mktemp("hang"), samples=70)


@pytest.fixture(scope="module")
def unbroken(base: Path) -> list[float]:
    folder = base / "ranks-unbroken"
    ranks.require_ok(
        ranks.run_ranks(2, [tiny.config(base, "unbroken", workers=2, stage=2)], folder), folder
    )
    return history.losses(base / "runs/unbroken")


def document_of(base: Path, name: str) -> dict:
    document = tiny.config(base, name, workers=2, stage=2)
    document["cluster"]["progress_timeout_s"] = TIMEOUT_S
    return document


def codes_within(processes: list, timeout_s: float) -> list[int | None]:
    """Return the exit codes after `timeout_s` at most; None for a process that still runs."""
    deadline = time.monotonic() + timeout_s
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        time.sleep(0.1)
    return [process.poll() for process in processes]


def require_resume(base: Path, name: str, unbroken: list[float]) -> None:
    """Run the same command again; it must reach the end of the undisturbed run."""
    folder, document = base / f"ranks-{name}-again", document_of(base, name)
    ranks.require_ok(ranks.run_ranks(2, [document], folder), folder)
    assert history.losses(base / "runs" / name) == unbroken
    history.require_exactly_once(base / "runs" / name, document)


def test_fault_4_a_stopped_rank_ends_the_attempt_with_stacks(
    base: Path, unbroken: list[float]
) -> None:
    folder = base / "ranks-stopped"
    processes = ranks.start_ranks(
        2, [document_of(base, "stopped")], folder, {"DIST_FT_FAILPOINT": "train.step:7@1!stop"}
    )
    try:
        assert codes_within(processes[:1], 120) == [75], (folder / "rank-0.log").read_text()[-2000:]
        assert processes[1].poll() is None
        log = (folder / "rank-0.log").read_text()
        assert (
            f"rank 0 made no progress for {TIMEOUT_S} s (cluster.progress_timeout_s={TIMEOUT_S}): "
            "a peer may be gone" in log
        )
        stacks = (base / "runs/stopped/attempts/000001-rank-00000-stacks.txt").read_text()
        assert "train_step" in stacks or "all_reduce" in stacks
        processes[1].send_signal(signal.SIGCONT)  # its own timeout is over too
        assert codes_within(processes, 30)[1] not in (None, 0)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
    require_resume(base, "stopped", unbroken)


@pytest.mark.slow  # tests/unit/runtime/test_watchdog.py shows it on one process
def test_fault_5_a_rank_that_holds_the_interpreter_lock_is_ended_by_faulthandler(
    base: Path,
) -> None:
    folder = base / "ranks-locked"
    processes = ranks.start_ranks(
        2, [document_of(base, "locked")], folder, {"DIST_FT_FAILPOINT": "train.step:7@1!lock"}
    )
    try:
        codes = codes_within(processes, 120)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
    assert codes[0] == 75 and codes[1] == 1, (folder / "rank-1.log").read_text()[-2000:]
    assert (
        "Timeout" in (folder / "rank-1.log").read_text()
        and "in _fail" in (folder / "rank-1.log").read_text()
    )


@pytest.mark.slow  # to the other ranks and on resume it is the kill of faults 1 and 2
def test_fault_5_a_segfault_is_noticed_from_outside(base: Path, unbroken: list[float]) -> None:
    folder = base / "ranks-fault"
    processes = ranks.start_ranks(
        2, [document_of(base, "fault")], folder, {"DIST_FT_FAILPOINT": "train.step:7@1!fault"}
    )
    codes = ranks.wait_for_death(processes)
    assert codes[1] == -signal.SIGSEGV
    require_resume(base, "fault", unbroken)
