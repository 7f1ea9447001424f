"""What driver and workers exchange, without Ray."""

from __future__ import annotations

import io
import logging
import subprocess
import sys
from multiprocessing import Pipe

import pytest

from dist_ft.core import logs
from dist_ft.core.errors import DataError
from dist_ft.runtime.elastic.coordinator import (
    DECIDE_S,
    MAX_LINES,
    REPORT_INTERVAL_S,
    SILENT_S,
    Coordinator,
    print_lines,
)
from dist_ft.runtime.elastic.messages import (
    CommittedCheckpoint,
    OutputLine,
    RunHealth,
    RunStatus,
    SaveDone,
)
from dist_ft.runtime.elastic.restart_policy import Failure
from dist_ft.runtime.elastic.worker_group_state import Member
from dist_ft.runtime.elastic.worker_process import _ParentPipe, _PipeConsole, _PipeLog
from dist_ft.training.console import Console
from dist_ft.training.result import Result


def test_coordinator_passes_lines_to_the_driver_and_stop_requests_to_supervisors():
    coordinator = Coordinator()
    coordinator.add_line("message", "a")
    coordinator.add_line("progress", "b")
    assert coordinator.take_lines() == [OutputLine("message", "a"), OutputLine("progress", "b")]
    assert coordinator.take_lines() == []
    assert coordinator.rank_0_silent_s() is None, "no worker has called"
    me = Member("key", 0, 1, "node", "host:1")
    assert not coordinator.join(me, 0).stop
    coordinator.request_stop()
    assert coordinator.status(me, 0).stop and 0 <= coordinator.rank_0_silent_s() < 60
    assert coordinator.outcome() is None
    first = Result("runs/r", 3, 3)
    coordinator.end_run(first)
    coordinator.end_run(DataError("later"))
    assert coordinator.outcome() is first


def test_save_requests_are_numbered_and_answered():
    coordinator = Coordinator()
    assert coordinator.is_save_done(coordinator.request_save()), (
        "no worker trains: there is nothing to wait for"
    )
    first, second = Member("a", 0, 2, "node", "host:1"), Member("a", 1, 2, "node", "")
    coordinator.join(first, 0)
    assert coordinator.is_save_done(coordinator.request_save()), "not all have joined"
    assert coordinator.join(second, 0).save_number == 2
    number = coordinator.request_save()
    assert number == coordinator.status(first, 0).save_number == 3 and not coordinator.is_save_done(
        number
    )
    coordinator.report_save_done(2)
    assert not coordinator.is_save_done(number), "that was an earlier request"
    coordinator.report_save_done(3)
    assert coordinator.is_save_done(number)


def test_save_request_is_open_until_it_is_answered():
    ours, theirs = Pipe()
    parent = _ParentPipe(theirs)
    assert not parent.should_save()
    parent._requested_number = 1
    assert parent.should_save() and parent.should_save(), (
        "the step of the first call may have been rolled back"
    )
    parent._requested_number = 2  # too late for the save of this step
    parent.on_save_end()
    assert ours.recv() == SaveDone(1) and parent.should_save()
    parent.on_save_end()
    assert ours.recv() == SaveDone(2) and not parent.should_save()


def test_save_of_ended_processes_counts_as_done(monkeypatch):
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)

    def training() -> tuple[Coordinator, int]:
        coordinator = Coordinator()
        coordinator.join(Member("a", 0, 1, "node", "host:1"), 0)
        number = coordinator.request_save()
        assert not coordinator.is_save_done(number)
        return coordinator, number

    coordinator, number = training()
    coordinator.report_failure(0, Failure(0, "node", "killed", "by SIGKILL"))
    assert coordinator.is_save_done(number)
    coordinator.join(Member("a", 0, 1, "node", "host:1"), 0)
    coordinator.status(Member("a", 0, 1, "node", "host:1"), 0)
    assert coordinator.is_save_done(number), "the next process got no request"
    coordinator, number = training()
    coordinator.end_run(Result("runs/r", 3, 3))
    assert coordinator.is_save_done(number)
    coordinator, number = training()
    now += SILENT_S + 1
    assert coordinator.is_save_done(number), "rank 0 vanished"


def test_supervisors_get_the_same_checkpoints_and_the_last_one_at_the_end(monkeypatch):
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    coordinator, me = Coordinator(), Member("key", 1, 2, "node", "")
    for step in range(10):
        coordinator.report_checkpoint(f"step-{step}", {"step": step})
        now += REPORT_INTERVAL_S / 4
    assert [one.url for one in coordinator.status(me, 0).checkpoints] == ["step-0", "step-5"]
    assert coordinator.status(me, 2).checkpoints == ()
    coordinator.end_run(Result("runs/r", 3, 3))
    assert coordinator.status(me, 2) == RunStatus(
        0, is_over=True, checkpoints=(CommittedCheckpoint("step-9", {"step": 9}),)
    )
    assert coordinator.status(me, 3).checkpoints == ()


def test_failures_are_logged_and_too_many_end_the_run():
    coordinator = Coordinator(max_failures=1)
    coordinator.join(Member("a", 0, 1, "node", "host:1"), 0)
    coordinator.report_failure(0, Failure(0, "node", "killed", "time 0"))
    first = coordinator.status(Member("a", 0, 1, "node", "host:1"), 0)
    assert (
        not first.is_over
        and first.generation == 1
        and first.reason == "worker 0 on node node: killed (time 0)"
    )
    coordinator.report_failure(1, Failure(0, "node", "killed", "time 1"))
    assert coordinator.status(Member("a", 0, 1, "node", "host:1"), 0).is_over
    assert "gave up after cluster.max_failures=1" in str(coordinator.outcome())
    lines = [line.text for line in coordinator.take_lines()]
    assert lines == [
        "WARNING worker 0 on node node: killed (time 0); all workers resume from the latest checkpoint",
        "WARNING worker 0 on node node: killed (time 1); the run ends",
    ]


def test_health_shows_progress_and_restarts():
    coordinator, me = Coordinator(max_failures=3), Member("a", 0, 1, "node", "host:1")
    coordinator.join(me, 0)
    assert coordinator.health() == RunHealth(0, "", 0, None)
    coordinator.report_progress_sign(None, "a")
    coordinator.report_progress_sign(4, "a")
    coordinator.report_local_checkpoint("a")
    assert coordinator.health() == RunHealth(0, "", 3, 4)
    coordinator.report_failure(0, Failure(0, "node", "killed", "by SIGKILL"))
    coordinator.status(me, 0)
    assert coordinator.health() == RunHealth(1, "worker 0 on node node: killed (by SIGKILL)", 3, 4)


def test_restart_waits_for_the_decision_on_a_node_that_failed(monkeypatch):
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    coordinator = Coordinator(3, exclude_node_after=1)
    members = [Member("a", 0, 2, "good", "host:1"), Member("a", 1, 2, "bad", "")]
    for member in members:
        coordinator.join(member, 0)
    coordinator.report_failure(0, Failure(1, "bad", "crash", "by SIGSEGV"))
    for member in members:
        coordinator.join(member, 0)
    status = [coordinator.join(member, 0) for member in members]
    assert [one.rendezvous for one in status] == [None, None]
    (failure,) = coordinator.take_node_failures()
    assert (failure.node, failure.kind) == ("bad", "crash")
    assert coordinator.take_node_failures() == []
    assert coordinator.join(members[0], 0).rendezvous == "host:1", "the driver left it in"


def test_driver_that_does_not_decide_delays_a_restart_for_a_limited_time(monkeypatch):
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    coordinator, me = Coordinator(3, exclude_node_after=1), Member("a", 0, 1, "bad", "host:1")
    coordinator.join(me, 0)
    coordinator.report_failure(0, Failure(0, "bad", "crash", "by SIGSEGV"))
    coordinator.join(me, 0)
    assert coordinator.join(me, 0).rendezvous is None
    now += DECIDE_S
    assert coordinator.join(me, 0).rendezvous == "host:1"


def test_workers_of_a_node_that_is_left_out_leave_and_the_others_wait():
    coordinator = Coordinator(0, exclude_node_after=1)
    good, bad = Member("a", 0, 2, "good", "host:1"), Member("a", 1, 2, "bad", "")
    coordinator.join(good, 0)
    coordinator.join(bad, 0)
    coordinator.leave_out(["bad"])
    assert coordinator.left_out() == ["bad"]
    assert coordinator.join(bad, 0).must_leave and not coordinator.join(good, 0).must_leave
    assert coordinator.join(good, 0).rendezvous is None

    # Ray places all workers anew, elsewhere; with max_failures=0 a failure would end the run.
    alone = coordinator.join(Member("b", 0, 1, "good", "host:2"), 0)
    assert alone.rendezvous == "host:2" and not alone.is_over
    assert alone.reason == "planned: worker 1 on node bad is left out"


def test_node_that_is_used_again_holds_nobody():
    coordinator, me = Coordinator(0, exclude_node_after=1), Member("a", 0, 1, "bad", "host:1")
    coordinator.join(me, 0)
    coordinator.leave_out(["bad"])
    assert coordinator.join(me, 0).rendezvous is None
    coordinator.leave_out([])
    assert coordinator.join(me, 0).rendezvous == "host:1"


def test_unfetched_lines_are_bounded_and_counted():
    coordinator = Coordinator()
    for number in range(MAX_LINES + 3):
        coordinator.add_line("log", str(number))
    lines = coordinator.take_lines()
    assert lines[:2] == [
        OutputLine("log", "WARNING 3 lines of worker output were dropped here"),
        OutputLine("log", "3"),
    ]
    assert len(lines) == MAX_LINES + 1 and coordinator.take_lines() == []


@pytest.fixture
def _loggers():
    logger = logging.getLogger("dist_ft")
    before = logger.handlers[:], logger.propagate, logger.level
    yield
    logger.handlers[:], logger.propagate, level = before
    logger.setLevel(level)


@pytest.mark.usefixtures("_loggers")
def test_log_lines_of_workers_reach_the_drivers_terminal_in_order(capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_0123456789")
    coordinator, (ours, theirs) = Coordinator(), Pipe()
    for rank in (0, 1):
        logs.setup_logging(rank, 2, extra_handler=_PipeLog(_ParentPipe(theirs)))
        logging.getLogger("dist_ft.x").info("news")
        logging.getLogger("dist_ft.x").warning(
            "no checkpoint at step 3: s3://u:p@h/x with hf_0123456789"
        )
        _PipeConsole(_ParentPipe(theirs)).show_progress(f"step {rank}")
    while ours.poll():
        line = ours.recv()
        assert isinstance(line, OutputLine)
        coordinator.add_line(line.kind, line.text)
    capsys.readouterr()
    shown = io.StringIO()
    lines = coordinator.take_lines()
    assert [line.kind for line in lines] == ["log", "log", "progress", "log", "progress"]
    print_lines(Console(shown), lines)
    warning = "WARNING no checkpoint at step 3: s3://<redacted>@h/x with <HF_TOKEN>\n"
    assert capsys.readouterr().err == f"[rank 0] INFO news\n[rank 0] {warning}[rank 1] {warning}"
    assert shown.getvalue() == "step 0\nstep 1\n"


def test_coordinator_and_driver_import_no_torch():
    program = (
        "import sys, dist_ft.runtime.elastic.coordinator, dist_ft.runtime.ray_backend.driver\n"
        "print([name for name in ('torch', 'transformers', 'deepspeed', 'ray') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
