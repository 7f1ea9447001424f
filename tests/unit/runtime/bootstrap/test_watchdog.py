"""The watchdog in its own process: a hang, an unreleased lock, steady progress."""

from __future__ import annotations

import subprocess
import sys

import pytest

from dist_ft.runtime.bootstrap import watchdog

PROGRAM = """
import ctypes, logging, sys, time
from dist_ft.runtime.bootstrap import watchdog
from dist_ft.storage.filesystem import Store
from dist_ft.core.world import World

logging.basicConfig()
watchdog.SECOND_TIMER_DELAY_S = 2.0
how, folder, timeout_s = sys.argv[1:]
with watchdog.Watchdog(Store(folder), 7, World(), float(timeout_s)) as dog:
    if how == "progress":
        for _ in range(20):
            time.sleep(0.2)
            dog.on_progress()
    elif how == "lock":
        ctypes.PyDLL(None).sleep(60)
    else:
        time.sleep(3 if how == "idle" else 60)
print("over")
"""


def play(mode: str, folder, timeout_s: float = 1) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, mode, str(folder), str(timeout_s)],
        capture_output=True,
        text=True,
        timeout=50,
    )


def test_fault_4_hang_ends_with_stacks_and_their_location(tmp_path):
    done = play("hang", tmp_path)
    stacks = tmp_path / watchdog.stacks_name(7, 0)
    assert done.returncode == watchdog.EXIT_CODE and "over" not in done.stdout
    assert (
        "rank 0 made no progress for 1 s (cluster.progress_timeout_s=1): a peer may be gone or stopped"
        in done.stderr
    )
    assert f"Stacks of all threads are at {stacks}" in done.stderr
    assert 'File "<string>", line 18 in <module>' in stacks.read_text()


def test_failing_storage_does_not_keep_a_hung_worker_alive(tmp_path):
    (tmp_path / "attempts").write_text("no folder")
    done = play("hang", tmp_path)
    assert done.returncode == watchdog.EXIT_CODE
    assert (
        "Stacks of all threads are in its log" in done.stderr
        and "line 18 in <module>" in done.stderr
    )


def test_fault_5_unreleased_lock_ends_by_the_timer_without_locks(tmp_path):
    done = play("lock", tmp_path)
    assert (
        done.returncode == 1
        and "Timeout (0:00:03)!" in done.stderr
        and "line 16 in <module>" in done.stderr
    )


@pytest.mark.parametrize(("how", "timeout_s"), [("progress", 1), ("idle", 0)])
def test_progress_or_disabled_watchdog_ends_nothing(tmp_path, how, timeout_s):
    done = play(how, tmp_path, timeout_s)
    assert (done.returncode, done.stdout) == (0, "over\n") and list(tmp_path.iterdir()) == []
