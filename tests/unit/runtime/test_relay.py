"""What driver and workers tell each other, without Ray."""

from __future__ import annotations

import io
import logging
import subprocess
import sys
from types import SimpleNamespace

import pytest

from dist_ft import logs
from dist_ft.errors import DataError
from dist_ft.runtime.relay import MOST_LINES, Relay, RelayLog, show
from dist_ft.train.console import Console
from dist_ft.train.result import Result


def test_the_relay_hands_lines_one_way_and_the_wish_to_stop_the_other():
    relay = Relay()
    relay.put("say", "a")
    relay.put("progress", "b")
    assert relay.take() == [("say", "a"), ("progress", "b")] and relay.take() == []
    assert relay.silent_s() is None, "no worker has been heard of"
    assert not relay.beat()
    relay.stop()
    assert relay.beat() and 0 <= relay.silent_s() < 60
    assert relay.outcome() is None
    first = Result("runs/r", 3, 3)
    relay.end(first)
    relay.end(DataError("later"))
    assert relay.outcome() is first


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
    relay = Relay()
    handle = SimpleNamespace(put=SimpleNamespace(remote=relay.put))
    for rank in (0, 1):
        logs.setup(rank, 2, also=RelayLog(handle))
        logging.getLogger("dist_ft.x").info("news")
        logging.getLogger("dist_ft.x").warning("no checkpoint at step 3: s3://u:p@h/x with hf_0123456789")
        relay.put("progress", f"step {rank}")
    capsys.readouterr()
    shown = io.StringIO()
    lines = relay.take()
    assert [kind for kind, _ in lines] == ["log", "log", "progress", "log", "progress"]
    show(Console(shown), lines)
    warning = "WARNING no checkpoint at step 3: s3://<redacted>@h/x with <HF_TOKEN>\n"
    assert capsys.readouterr().err == f"[rank 0] INFO news\n[rank 0] {warning}[rank 1] {warning}"
    assert shown.getvalue() == "step 0\nstep 1\n"


def test_the_relay_and_the_driver_start_without_torch():
    program = ("import sys, dist_ft.runtime.relay, dist_ft.runtime.ray_train\n"
               "print([name for name in ('torch', 'transformers', 'deepspeed', 'ray') if name in sys.modules])")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
