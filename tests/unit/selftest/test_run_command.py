"""A command runs to its end, is stopped by a signal, and never outlives its time limit."""

from __future__ import annotations

import os
import sys
import time

from dist_ft.selftest import run_command as module
from dist_ft.selftest.drill_scenarios import TimedLine
from dist_ft.selftest.run_command import run_command


def test_output_is_collected_and_own_failpoints_are_not_passed_on(monkeypatch):
    monkeypatch.setenv("DIST_FT_FAILPOINT", "mine")
    lines: list[TimedLine] = []
    program = "import os; print(os.environ.get('DIST_FT_FAILPOINT'), os.environ['OWN']); raise SystemExit(3)"
    assert (
        run_command([sys.executable, "-c", program], {"OWN": "x"}, 60, time.monotonic(), lines) == 3
    )
    assert [line.text for line in lines] == ["None x"] and 0 < lines[0].at_s < 60


def test_command_gets_sigterm_when_it_reports_the_failpoint():
    program = (
        "import signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(130))\n"
        "print('WARNING failpoint train.step: sleep5', flush=True)\ntime.sleep(60)"
    )
    assert (
        run_command(
            [sys.executable, "-c", program], {}, 60, time.monotonic(), [], send_sigterm=True
        )
        == 130
    )


def test_command_beyond_its_limit_is_killed_with_all_it_started(monkeypatch):
    monkeypatch.setattr(module, "STOP_S", 0.5)
    program = (
        "import signal, subprocess, sys, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']).pid, flush=True)\n"
        "time.sleep(600)"
    )
    lines: list[TimedLine] = []
    assert run_command([sys.executable, "-c", program], {}, 2, time.monotonic(), lines) is None
    assert lines[-1].text == "the command did not end within 2 s and is killed"
    until = time.monotonic() + 10
    while (
        os.path.exists(f"/proc/{lines[0].text}")
        and time.monotonic() < until
        and not _is_zombie(lines[0].text)
    ):
        time.sleep(0.05)
    assert not os.path.exists(f"/proc/{lines[0].text}") or _is_zombie(lines[0].text)


def _is_zombie(pid: str) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True
