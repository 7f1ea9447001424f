"""A command is followed to its end, told to stop, and never outlives its time."""

from __future__ import annotations

import os
import sys
import time

from dist_ft.selftest import run_command
from dist_ft.selftest.drill_scenarios import Line
from dist_ft.selftest.run_command import follow


def test_a_command_is_followed_and_failpoints_of_this_process_are_not_passed_on(monkeypatch):
    monkeypatch.setenv("DIST_FT_FAILPOINT", "mine")
    said: list[Line] = []
    program = "import os; print(os.environ.get('DIST_FT_FAILPOINT'), os.environ['OWN']); raise SystemExit(3)"
    assert follow([sys.executable, "-c", program], {"OWN": "x"}, 60, time.monotonic(), said) == 3
    assert [line.text for line in said] == ["None x"] and 0 < said[0].at_s < 60


def test_a_command_is_told_to_stop_when_it_tells_of_the_failpoint():
    program = (
        "import signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(130))\n"
        "print('WARNING failpoint train.step: sleep5', flush=True)\ntime.sleep(60)"
    )
    assert (
        follow([sys.executable, "-c", program], {}, 60, time.monotonic(), [], terminate=True) == 130
    )


def test_a_command_that_does_not_end_is_ended_with_all_it_started(monkeypatch):
    monkeypatch.setattr(run_command, "LEAVE_S", 0.5)
    program = (
        "import signal, subprocess, sys, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']).pid, flush=True)\n"
        "time.sleep(600)"
    )
    said: list[Line] = []
    assert follow([sys.executable, "-c", program], {}, 2, time.monotonic(), said) is None
    assert said[-1].text == "no end within 2 s; it is ended"
    until = time.monotonic() + 10
    while (
        os.path.exists(f"/proc/{said[0].text}")
        and time.monotonic() < until
        and not _is_zombie(said[0].text)
    ):
        time.sleep(0.05)
    assert not os.path.exists(f"/proc/{said[0].text}") or _is_zombie(said[0].text)


def _is_zombie(pid: str) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True
