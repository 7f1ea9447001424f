"""A failpoint kills the process at the specified hit, optionally once, and otherwise does nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from dist_ft.core import fault_injection

PROGRAM = (
    "from dist_ft.core import fault_injection\n"
    "for i in range(5):\n"
    "    for rank in (0, 1):\n"
    "        print(i, rank, flush=True)\n"
    "        fault_injection.hit('place', rank)\n"
)


def run(**env) -> tuple[int, str]:
    """Return exit code and last line (pass, rank) of a process that hits a failpoint ten times."""
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, env={**os.environ, **env}
    )
    return ran.returncode, ran.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("specification", "last"),
    [
        ("place", "0 0"),
        ("place:3", "1 0"),
        ("place:2@1", "1 1"),
        ("place@1", "0 1"),
        ("place:5@0", "4 0"),
    ],
)
def test_process_is_killed_at_the_specified_hit(specification, last):
    assert run(DIST_FT_FAILPOINT=specification) == (-signal.SIGKILL, last)


@pytest.mark.parametrize("specification", ["", "elsewhere", "place:11", "place:1@7", "plac"])
def test_other_failpoints_do_nothing(specification):
    assert run(DIST_FT_FAILPOINT=specification) == (0, "4 1")


def test_process_is_killed_once_over_processes(tmp_path):
    env = {"DIST_FT_FAILPOINT": "place:2", "DIST_FT_FAILPOINT_ONCE": str(tmp_path / "died")}
    assert run(**env) == (-signal.SIGKILL, "0 1")
    assert run(**env) == (0, "4 1")


def test_several_failpoints_fail_once_each(tmp_path):
    env = {
        "DIST_FT_FAILPOINT": "place:2@0!abort;elsewhere;place:4@1",
        "DIST_FT_FAILPOINT_ONCE": str(tmp_path / "died"),
    }
    assert run(**env) == (-signal.SIGABRT, "1 0")
    assert run(**env) == (-signal.SIGKILL, "3 1")
    assert run(**env) == (0, "4 1")


def test_storage_and_sleep_log_a_warning_and_do_not_kill():
    program = (
        "import time\nfrom dist_ft.core import fault_injection\nstart = time.monotonic()\n"
        "try:\n    fault_injection.hit('place')\nexcept Exception as error:\n    print(type(error).__name__)\n"
        "print(time.monotonic() - start > 0.3)"
    )
    for action, expected in (
        ("storage", ["StorageError", "False"]),
        ("sleep0.3", ["True"]),
        ("sleep0.3+storage", ["StorageError", "True"]),
    ):
        ran = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            env={**os.environ, "DIST_FT_FAILPOINT": f"place!{action}"},
        )
        assert (
            ran.stdout.splitlines() == expected
            and ran.stderr.splitlines()[0] == f"failpoint place: {action}"
        )


def test_a_star_fails_at_each_hit_and_logs_once():
    program = (
        "import time\nfrom dist_ft.core import fault_injection\nstart = time.monotonic()\n"
        "for _ in range(3):\n    fault_injection.hit('place')\nprint(0.3 < time.monotonic() - start < 5)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={**os.environ, "DIST_FT_FAILPOINT": "place:*!sleep0.1"},
    )
    assert ran.stdout.split() == ["True"] and ran.stderr.splitlines() == [
        "failpoint place: sleep0.1"
    ]


def test_environment_has_the_variables_for_another_process(monkeypatch):
    monkeypatch.delenv("DIST_FT_FAILPOINT_ONCE", raising=False)
    monkeypatch.setenv("DIST_FT_FAILPOINT", "place")
    assert fault_injection.environment() == {"DIST_FT_FAILPOINT": "place"}
