"""A kept process belongs to its worker, then to one other, then to none."""

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
    "while True:\n    message = pipe.recv()\n    if message == 'leave':\n        sys.exit(7)\n    pipe.send(message)\n"
)
COMMAND = [sys.executable, "-c", ECHO]
WORKER = (
    "import os, sys, time\nfrom dist_ft.runtime.elastic import process_keeper as keeper\n"
    "process = keeper.start([sys.executable, '-c', sys.argv[1]], dict(os.environ), sys.argv[2])\n"
    "if sys.argv[3] != 'new':\n    process.allow_claim()\n"
    "if sys.argv[3] == 'bound':\n    process.bind_to_worker()\nprint(process.pid, flush=True)\ntime.sleep(600)\n"
)


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(process_keeper.tempfile, "tempdir", None)
    return tmp_path / f"dist_ft-{os.getuid()}"


def start_and_lose_worker(name: str, state: str) -> int:
    """Return the id of a process whose worker was killed."""
    worker = subprocess.Popen(
        [sys.executable, "-c", WORKER, ECHO, name, state], stdout=subprocess.PIPE, text=True
    )
    assert worker.stdout is not None
    pid = int(worker.stdout.readline())
    worker.kill()
    worker.wait()
    return pid


def is_running(pid: int) -> bool:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    return False


def wait_until(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def wait_and_claim(name: str) -> process_keeper.KeptProcess:
    """Return the process, which its keeper offers a moment after its worker is gone."""
    found: list[process_keeper.KeptProcess] = []
    wait_until(lambda: found.extend(filter(None, [process_keeper.claim(name)])) or found)
    return found[0]


def test_process_answers_and_has_an_exit_code():
    process = process_keeper.start(COMMAND, dict(os.environ), "a")
    process.pipe.send("echo")
    assert process.pipe.recv() == "echo" and is_running(process.pid)
    assert os.getpgid(process.pid) != os.getpgrp()
    process.pipe.send("leave")
    assert process.wait() == 7
    process.kill()


def test_killed_process_returns_its_signal():
    process = process_keeper.start(COMMAND, dict(os.environ), "a")
    os.kill(process.pid, signal.SIGSEGV)
    assert process.wait() == -signal.SIGSEGV
    process.kill()


def test_kill_waits_until_a_stopped_process_has_ended():
    process = process_keeper.start(COMMAND, dict(os.environ), "a")
    os.kill(process.pid, signal.SIGSTOP)
    process.kill()
    assert not is_running(process.pid)


def test_bound_process_ends_with_its_worker():
    pid = start_and_lose_worker("a", "bound")
    wait_until(lambda: not is_running(pid))
    assert process_keeper.claim("a") is None


def test_process_without_complete_setup_ends_with_its_worker():
    pid = start_and_lose_worker("a", "new")
    wait_until(lambda: not is_running(pid))
    assert process_keeper.claim("a") is None


def test_process_that_closes_its_pipe_and_stays_is_killed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(process_keeper, "ANSWER_S", 1.0)
    stay = "import os, sys, time\nos.close(int(sys.argv[1]))\ntime.sleep(600)\n"
    process = process_keeper.start([sys.executable, "-c", stay], dict(os.environ), "a")
    with pytest.raises(EOFError):
        process.pipe.recv()
    assert process.wait() == -signal.SIGKILL and not is_running(process.pid)
    process.kill()


def test_keeper_ignores_signals():
    process = process_keeper.start(COMMAND, dict(os.environ), "a")
    parent = int(Path(f"/proc/{process.pid}/stat").read_text().split()[3])
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        os.kill(parent, number)
    process.pipe.send("echo")
    assert process.pipe.recv() == "echo"
    process.pipe.send("leave")
    assert process.wait() == 7
    process.kill()


def test_unbound_process_is_claimed_once_by_the_same_name(own_folder: Path):
    pid = start_and_lose_worker("a", "spare")
    process = wait_and_claim("a")
    assert (
        process.pid == pid
        and process_keeper.claim("a") is None
        and process_keeper.claim("b") is None
    )
    assert stat.S_IMODE(own_folder.stat().st_mode) == 0o700
    process.pipe.send("echo")
    assert process.pipe.recv() == "echo"
    process.allow_claim()
    process.bind_to_worker()
    process.pipe.send("leave")
    assert process.wait() == 7
    process.kill()
    wait_until(lambda: not list(own_folder.iterdir()))


def test_unclaimed_process_is_killed_in_time(own_folder: Path):
    code = "import sys\nfrom dist_ft.runtime.elastic import process_keeper as keeper\nkeeper.UNCLAIMED_S = 0.2\nkeeper.main()\n"
    ours, theirs = process_keeper.socket.socketpair()
    subprocess.run(
        [
            sys.executable,
            "-c",
            code,
            str(theirs.fileno()),
            process_keeper._socket_path_prefix("a"),
            *COMMAND,
        ],
        pass_fds=[theirs.fileno()],
        check=True,
    )
    theirs.close()
    process = process_keeper.KeptProcess(ours)
    process.allow_claim()
    process._keeper.close()
    wait_until(lambda: not is_running(process.pid))
    wait_until(lambda: not list(own_folder.iterdir()))


def test_socket_of_a_killed_keeper_is_removed(own_folder: Path):
    pid = start_and_lose_worker("a", "spare")
    wait_until(lambda: list(own_folder.iterdir()))
    os.kill(int(Path(f"/proc/{pid}/stat").read_text().split()[3]), signal.SIGKILL)
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not is_running(pid))
    wait_until(lambda: process_keeper.claim("a") is None and not list(own_folder.iterdir()))


def test_process_cannot_be_claimed_from_a_folder_others_can_write(own_folder: Path):
    own_folder.mkdir()
    own_folder.chmod(0o777)
    pid = start_and_lose_worker("a", "spare")
    wait_until(lambda: not is_running(pid))
    assert process_keeper.claim("a") is None and not list(own_folder.iterdir())
