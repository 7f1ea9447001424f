"""What driver and workers tell each other, without Ray."""

from __future__ import annotations

import io
import logging
import subprocess
import sys
from multiprocessing import Pipe

import pytest

from dist_ft.core import logs
from dist_ft.core.errors import DataError
from dist_ft.runtime.elastic.coordinator import MOST_LINES, REPORT_EVERY_S, SILENT_S, Relay, show
from dist_ft.runtime.elastic.restart_policy import Failure, Member, View
from dist_ft.runtime.elastic.worker_process import _Child, _PipeConsole, _PipeLog
from dist_ft.training.console import Console
from dist_ft.training.result import Result


def test_the_relay_hands_lines_one_way_and_the_wish_to_stop_the_other():
    relay = Relay()
    relay.put("say", "a")
    relay.put("progress", "b")
    assert relay.take() == [("say", "a"), ("progress", "b")] and relay.take() == []
    assert relay.silent_s() is None, "no worker has been heard of"
    me = Member("key", 0, 1, "node", "host:1")
    assert not relay.meet(me, 0).stop
    relay.stop()
    assert relay.look(me, 0).stop and 0 <= relay.silent_s() < 60
    assert relay.outcome() is None
    first = Result("runs/r", 3, 3)
    relay.end(first)
    relay.end(DataError("later"))
    assert relay.outcome() is first


def test_a_wish_to_save_is_numbered_and_answered():
    relay = Relay()
    assert relay.is_saved(relay.save()), "nobody trains: there is nothing to wait for"
    first, second = Member("a", 0, 2, "node", "host:1"), Member("a", 1, 2, "node", "")
    relay.meet(first, 0)
    assert relay.is_saved(relay.save()), "not all have come"
    assert relay.meet(second, 0).saves == 2
    number = relay.save()
    assert number == relay.look(first, 0).saves == 3 and not relay.is_saved(number)
    relay.saved(2)
    assert not relay.is_saved(number), "that was an earlier wish"
    relay.saved(3)
    assert relay.is_saved(number)


def test_a_wish_to_save_stands_until_it_is_answered():
    ours, theirs = Pipe()
    child = _Child(theirs)
    assert not child.should_save()
    child._wish = 1
    assert child.should_save() and child.should_save(), (
        "the step it was told in may have been gone back on"
    )
    child._wish = 2  # too late for the save of this step
    child.saved()
    assert ours.recv() == ("saved", 1) and child.should_save()
    child.saved()
    assert ours.recv() == ("saved", 2) and not child.should_save()


def test_nobody_waits_for_a_save_of_processes_that_ended(monkeypatch):
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)

    def training() -> tuple[Relay, int]:
        relay = Relay()
        relay.meet(Member("a", 0, 1, "node", "host:1"), 0)
        number = relay.save()
        assert not relay.is_saved(number)
        return relay, number

    relay, number = training()
    relay.failed(0, Failure(0, "node", "killed", "by SIGKILL"))
    assert relay.is_saved(number)
    relay.meet(Member("a", 0, 1, "node", "host:1"), 0)
    relay.look(Member("a", 0, 1, "node", "host:1"), 0)
    assert relay.is_saved(number), "the process after it was not asked"
    relay, number = training()
    relay.end(Result("runs/r", 3, 3))
    assert relay.is_saved(number)
    relay, number = training()
    now += SILENT_S + 1
    assert relay.is_saved(number), "rank 0 is gone without a word"


def test_all_supervisors_see_the_same_reports_and_the_last_one_in_the_end(monkeypatch):
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    relay, me = Relay(), Member("key", 1, 2, "node", "")
    for step in range(10):
        relay.committed(f"step-{step}", {"step": step})
        now += REPORT_EVERY_S / 4
    assert [url for url, _ in relay.look(me, 0).commits] == ["step-0", "step-5"]
    assert relay.look(me, 2).commits == ()
    relay.end(Result("runs/r", 3, 3))
    assert relay.look(me, 2) == View(0, over=True, commits=(("step-9", {"step": 9}),))
    assert relay.look(me, 3).commits == ()


def test_who_failed_is_told_and_after_too_often_the_run_ends():
    relay = Relay(max_failures=1)
    relay.meet(Member("a", 0, 1, "node", "host:1"), 0)
    relay.failed(0, Failure(0, "node", "killed", "time 0"))
    first = relay.look(Member("a", 0, 1, "node", "host:1"), 0)
    assert (
        not first.over
        and first.generation == 1
        and first.after == "worker 0 on node node: killed (time 0)"
    )
    relay.failed(1, Failure(0, "node", "killed", "time 1"))
    assert relay.look(Member("a", 0, 1, "node", "host:1"), 0).over
    assert "gave up after cluster.max_failures=1" in str(relay.outcome())
    lines = [text for _, text in relay.take()]
    assert lines == [
        "WARNING worker 0 on node node: killed (time 0); all workers go on from the newest checkpoint",
        "WARNING worker 0 on node node: killed (time 1); the run ends",
    ]


def test_lines_nobody_fetches_are_bounded_and_counted():
    relay = Relay()
    for number in range(MOST_LINES + 3):
        relay.put("log", str(number))
    lines = relay.take()
    assert lines[:2] == [("log", "WARNING 3 lines of the workers are left out here"), ("log", "3")]
    assert len(lines) == MOST_LINES + 1 and relay.take() == []


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
    relay, (ours, theirs) = Relay(), Pipe()
    for rank in (0, 1):
        logs.setup_logging(rank, 2, extra_handler=_PipeLog(_Child(theirs)))
        logging.getLogger("dist_ft.x").info("news")
        logging.getLogger("dist_ft.x").warning(
            "no checkpoint at step 3: s3://u:p@h/x with hf_0123456789"
        )
        _PipeConsole(_Child(theirs)).progress(f"step {rank}")
    while ours.poll():
        kind, *line = ours.recv()
        assert kind == "line"
        relay.put(*line)
    capsys.readouterr()
    shown = io.StringIO()
    lines = relay.take()
    assert [kind for kind, _ in lines] == ["log", "log", "progress", "log", "progress"]
    show(Console(shown), lines)
    warning = "WARNING no checkpoint at step 3: s3://<redacted>@h/x with <HF_TOKEN>\n"
    assert capsys.readouterr().err == f"[rank 0] INFO news\n[rank 0] {warning}[rank 1] {warning}"
    assert shown.getvalue() == "step 0\nstep 1\n"


def test_the_relay_and_the_driver_start_without_torch():
    program = (
        "import sys, dist_ft.runtime.elastic.coordinator, dist_ft.runtime.ray_backend.driver\n"
        "print([name for name in ('torch', 'transformers', 'deepspeed', 'ray') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
