"""A failpoint kills the process where the test asked, once if asked, and else does nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from dist_ft.core import fault_injection

PROGRAM = (
    "from dist_ft.core import fault_injection as failpoints\n"
    "for i in range(5):\n"
    "    for rank in (0, 1):\n"
    "        print(i, rank, flush=True)\n"
    "        failpoints.hit('place', rank)\n"
)


def run(**env) -> tuple[int, str]:
    """Return exit code and the last line (passing, rank) of a process that passes a failpoint ten times."""
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, env={**os.environ, **env}
    )
    return ran.returncode, ran.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("wanted", "last"),
    [
        ("place", "0 0"),
        ("place:3", "1 0"),
        ("place:2@1", "1 1"),
        ("place@1", "0 1"),
        ("place:5@0", "4 0"),
    ],
)
def test_dies_at_the_passing_that_was_asked_for(wanted, last):
    assert run(DIST_FT_FAILPOINT=wanted) == (-signal.SIGKILL, last)


@pytest.mark.parametrize("wanted", ["", "elsewhere", "place:11", "place:1@7", "plac"])
def test_passes_otherwise(wanted):
    assert run(DIST_FT_FAILPOINT=wanted) == (0, "4 1")


def test_dies_only_once_over_processes(tmp_path):
    env = {"DIST_FT_FAILPOINT": "place:2", "DIST_FT_FAILPOINT_ONCE": str(tmp_path / "died")}
    assert run(**env) == (-signal.SIGKILL, "0 1")
    assert run(**env) == (0, "4 1")


def test_it_says_so_first_and_storage_or_sleep_are_no_death():
    program = (
        "import time\nfrom dist_ft.core import fault_injection as failpoints\nbegun = time.monotonic()\n"
        "try:\n    failpoints.hit('place')\nexcept Exception as error:\n    print(type(error).__name__)\n"
        "print(time.monotonic() - begun > 0.3)"
    )
    for how, said in (
        ("storage", ["StorageError", "False"]),
        ("sleep0.3", ["True"]),
        ("sleep0.3+storage", ["StorageError", "True"]),
    ):
        ran = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            env={**os.environ, "DIST_FT_FAILPOINT": f"place!{how}"},
        )
        assert (
            ran.stdout.splitlines() == said
            and ran.stderr.splitlines()[0] == f"failpoint place: {how}"
        )


def test_every_passing_if_asked_and_one_line_says_so():
    program = (
        "import time\nfrom dist_ft.core import fault_injection as failpoints\nbegun = time.monotonic()\n"
        "for _ in range(3):\n    failpoints.hit('place')\nprint(0.3 < time.monotonic() - begun < 5)"
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


def test_what_was_asked_can_be_handed_on(monkeypatch):
    monkeypatch.delenv("DIST_FT_FAILPOINT_ONCE", raising=False)
    monkeypatch.setenv("DIST_FT_FAILPOINT", "place")
    assert fault_injection.environment() == {"DIST_FT_FAILPOINT": "place"}
