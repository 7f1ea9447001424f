"""A kept process is its worker's, then one other's, then nobody's."""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dist_ft.runtime.elastic import process_keeper

ECHO = (
    "import sys\nfrom multiprocessing.connection import Connection\npipe = Connection(int(sys.argv[1]))\n"
    "while True:\n    said = pipe.recv()\n    if said == 'leave':\n        sys.exit(7)\n    pipe.send(said)\n"
)
COMMAND = [sys.executable, "-c", ECHO]
WORKER = (
    "import os, sys, time\nfrom dist_ft.runtime.elastic import process_keeper as keeper\n"
    "kept = keeper.start([sys.executable, '-c', sys.argv[1]], dict(os.environ), sys.argv[2])\n"
    "if sys.argv[3] != 'new':\n    kept.ready()\n"
    "if sys.argv[3] == 'begun':\n    kept.begun()\nprint(kept.pid, flush=True)\ntime.sleep(600)\n"
)


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(process_keeper.tempfile, "tempdir", None)
    return tmp_path / f"dist_ft-{os.getuid()}"


def lost(name: str, state: str) -> int:
    """Return the id of a process whose worker was killed."""
    worker = subprocess.Popen(
        [sys.executable, "-c", WORKER, ECHO, name, state], stdout=subprocess.PIPE, text=True
    )
    assert worker.stdout is not None
    pid = int(worker.stdout.readline())
    worker.kill()
    worker.wait()
    return pid


def is_there(pid: int) -> bool:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    return False


def wait_until(what) -> None:
    deadline = time.monotonic() + 20
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def claimed(name: str) -> process_keeper.Kept:
    """Return the process, which its keeper offers a moment after its worker is gone."""
    found: list[process_keeper.Kept] = []
    wait_until(lambda: found.extend(filter(None, [process_keeper.claim(name)])) or found)
    return found[0]


def test_a_process_talks_and_tells_how_it_ended():
    kept = process_keeper.start(COMMAND, dict(os.environ), "a")
    kept.pipe.send("heard")
    assert kept.pipe.recv() == "heard" and is_there(kept.pid)
    assert os.getpgid(kept.pid) != os.getpgrp()
    kept.pipe.send("leave")
    assert kept.wait() == 7
    kept.end()


def test_a_killed_process_has_a_signal_for_its_code():
    kept = process_keeper.start(COMMAND, dict(os.environ), "a")
    os.kill(kept.pid, signal.SIGSEGV)
    assert kept.wait() == -signal.SIGSEGV
    kept.end()


def test_end_waits_until_a_stopped_process_is_gone():
    kept = process_keeper.start(COMMAND, dict(os.environ), "a")
    os.kill(kept.pid, signal.SIGSTOP)
    kept.end()
    assert not is_there(kept.pid)


def test_a_process_that_has_begun_ends_with_its_worker():
    pid = lost("a", "begun")
    wait_until(lambda: not is_there(pid))
    assert process_keeper.claim("a") is None


def test_one_that_was_not_told_all_it_needs_ends_with_its_worker_too():
    pid = lost("a", "new")
    wait_until(lambda: not is_there(pid))
    assert process_keeper.claim("a") is None


def test_a_process_that_closes_its_pipe_and_stays_is_killed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(process_keeper, "ANSWER_S", 1.0)
    stay = "import os, sys, time\nos.close(int(sys.argv[1]))\ntime.sleep(600)\n"
    kept = process_keeper.start([sys.executable, "-c", stay], dict(os.environ), "a")
    with pytest.raises(EOFError):
        kept.pipe.recv()
    assert kept.wait() == -signal.SIGKILL and not is_there(kept.pid)
    kept.end()


def test_signals_to_all_are_the_processs_to_answer():
    kept = process_keeper.start(COMMAND, dict(os.environ), "a")
    parent = int(Path(f"/proc/{kept.pid}/stat").read_text().split()[3])
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        os.kill(parent, number)
    kept.pipe.send("heard")
    assert kept.pipe.recv() == "heard"
    kept.pipe.send("leave")
    assert kept.wait() == 7
    kept.end()


def test_one_that_has_not_is_claimed_by_one_other_of_the_same_name(own_folder: Path):
    pid = lost("a", "spare")
    kept = claimed("a")
    assert (
        kept.pid == pid and process_keeper.claim("a") is None and process_keeper.claim("b") is None
    )
    assert stat.S_IMODE(own_folder.stat().st_mode) == 0o700
    kept.pipe.send("heard")
    assert kept.pipe.recv() == "heard"
    kept.ready()
    kept.begun()
    kept.pipe.send("leave")
    assert kept.wait() == 7
    kept.end()
    wait_until(lambda: not list(own_folder.iterdir()))


def test_what_nobody_claims_ends_in_time(own_folder: Path):
    code = "import sys\nfrom dist_ft.runtime.elastic import process_keeper as keeper\nkeeper.KEPT_S = 0.2\nkeeper.main()\n"
    ours, theirs = process_keeper.socket.socketpair()
    subprocess.run(
        [sys.executable, "-c", code, str(theirs.fileno()), process_keeper._prefix("a"), *COMMAND],
        pass_fds=[theirs.fileno()],
        check=True,
    )
    theirs.close()
    kept = process_keeper.Kept(ours)
    kept.ready()
    kept._keeper.close()
    wait_until(lambda: not is_there(kept.pid))
    wait_until(lambda: not list(own_folder.iterdir()))


def test_a_killed_keeper_leaves_a_door_nobody_opens(own_folder: Path):
    pid = lost("a", "spare")
    wait_until(lambda: list(own_folder.iterdir()))
    os.kill(int(Path(f"/proc/{pid}/stat").read_text().split()[3]), signal.SIGKILL)
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not is_there(pid))
    wait_until(lambda: process_keeper.claim("a") is None and not list(own_folder.iterdir()))


def test_in_a_folder_others_may_write_to_nothing_is_kept(own_folder: Path):
    own_folder.mkdir()
    own_folder.chmod(0o777)
    pid = lost("a", "spare")
    wait_until(lambda: not is_there(pid))
    assert process_keeper.claim("a") is None and not list(own_folder.iterdir())
