"""Keeps a process for the worker that asked for it, and, where the worker is lost, for the next one on this node.

When a node is lost Ray ends the workers on all other nodes too and places new ones. What a spare process of theirs has
imported would be lost with them: so its parent is not the worker but a keeper, a process of the standard library alone
that is no child of the worker. Guarantees: a process that has begun ends with its worker, whatever either does (its
keeper kills it, and the kernel does with the keeper); one that has not may be claimed by one other worker of the same
user, run and node, for `KEPT_S` seconds, and ends after them.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import select
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from multiprocessing.connection import Connection, Pipe

log = logging.getLogger("dist_ft.keeper")
KEPT_S = 120.0
ANSWER_S = 30.0
READY, BEGIN, END = b"r", b"b", b"e"
_NUMBER = struct.Struct("i")


class Kept:
    """A kept process, as the worker that has it sees it."""

    def __init__(self, keeper: socket.socket) -> None:
        """Take the process from its keeper; raises OSError if that is gone, or gives it to somebody else."""
        self._keeper = keeper
        keeper.settimeout(ANSWER_S)
        said, descriptors, _, _ = socket.recv_fds(keeper, _NUMBER.size, 1)
        if len(said) < _NUMBER.size or not descriptors:
            keeper.close()
            raise ConnectionError("the process is not to be had")
        (self.pid,) = _NUMBER.unpack(said)
        os.set_inheritable(descriptors[0], False)
        self.pipe = Connection(descriptors[0])

    def ready(self) -> None:
        """Let another worker claim it, if this one is lost: it has been told all it needs before it begins."""
        self._say(READY)

    def begun(self) -> None:
        """Have it end with this worker from now on."""
        self._say(BEGIN)

    def _say(self, what: bytes) -> None:
        with contextlib.suppress(OSError):
            self._keeper.sendall(what)

    def wait(self) -> int:
        """Return the exit code (negative: signal) of a process that has closed its pipe.

        One that does not end in a while is killed; where its keeper was killed it was, too.
        """
        for _ in range(2):
            with contextlib.suppress(OSError):
                self._keeper.settimeout(ANSWER_S)
                said = self._keeper.recv(_NUMBER.size, socket.MSG_WAITALL)
                return (
                    int(_NUMBER.unpack(said)[0]) if len(said) == _NUMBER.size else -signal.SIGKILL
                )
            self._say(END)
        return -signal.SIGKILL

    def end(self) -> None:
        """Kill it, whatever it does, and wait until it is gone."""
        self._say(END)
        with contextlib.suppress(OSError):
            self._keeper.settimeout(ANSWER_S)
            while self._keeper.recv(_NUMBER.size):
                pass
        self._keeper.close()
        self.pipe.close()


def start(command: Sequence[str], environment: dict[str, str], name: str) -> Kept:
    """Start `command` followed by the number of the descriptor of its pipe; `name`: who may claim it later."""
    ours, theirs = socket.socketpair()
    with theirs:
        keeper = subprocess.Popen(
            [sys.executable, "-m", __name__, str(theirs.fileno()), _prefix(name), *command],
            pass_fds=[theirs.fileno()],
            start_new_session=True,
            env=environment,
        )
    try:
        keeper.wait(ANSWER_S)  # it has a child that goes on
    except subprocess.TimeoutExpired as error:
        keeper.kill()
        raise TimeoutError("no process can be started") from error
    return Kept(ours)


def claim(name: str) -> Kept | None:
    """Return a process that was kept under `name` and is nobody's, if there is one."""
    folder, prefix = os.path.split(_prefix(name))
    for entry in sorted(os.listdir(folder)) if folder else ():
        if not entry.startswith(prefix):
            continue
        keeper = socket.socket(socket.AF_UNIX)
        try:
            keeper.settimeout(ANSWER_S)
            keeper.connect(os.path.join(folder, entry))
            return Kept(keeper)
        except OSError:  # another worker was first, its time is over, or it was killed
            keeper.close()
            _tidy(folder, entry)
    return None


def _tidy(folder: str, entry: str) -> None:
    """Remove the socket of a keeper that is no more."""
    with contextlib.suppress(OSError, ValueError):
        try:
            os.kill(int(entry.rpartition("-")[2]), 0)
        except ProcessLookupError:
            os.unlink(os.path.join(folder, entry))


def _prefix(name: str) -> str:
    """Return the path under which processes of this name wait, short as those of sockets must be.

    Empty if others may write to its folder: nothing is kept then.
    """
    folder = os.path.join(tempfile.gettempdir(), f"dist_ft-{os.getuid()}")
    with contextlib.suppress(OSError):
        os.mkdir(folder, 0o700)
    try:
        found = os.lstat(folder)
    except OSError:
        return ""
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        log.warning(
            "%s is not a folder of this user alone: spare processes are not kept for later workers",
            folder,
        )
        return ""
    return os.path.join(folder, hashlib.sha256(name.encode()).hexdigest()[:16] + "-")


def main() -> None:
    """Start the process and keep it; the arguments are `start`'s."""
    descriptor, prefix, *command = sys.argv[1:]
    if os.fork():
        os._exit(0)  # Ray kills the children of a worker that it ends: this one has no parent
    worker = socket.socket(fileno=int(descriptor))
    worker.set_inheritable(False)
    pipe, theirs = Pipe()
    process = subprocess.Popen(
        [*command, str(theirs.fileno())], pass_fds=[theirs.fileno()], start_new_session=True
    )
    theirs.close()
    for number in (
        signal.SIGINT,
        signal.SIGTERM,
        signal.SIGHUP,
    ):  # what they mean the process decides
        signal.signal(number, signal.SIG_IGN)
    ended, wake = socket.socketpair()
    threading.Thread(target=_tell, args=(process, wake), daemon=True).start()
    try:
        while _serve(worker, pipe, process, ended) and prefix:
            found = _next_worker(f"{prefix}{os.getpid()}", ended)
            if found is None:
                break
            worker = found
    finally:
        process.kill()
        code = process.wait()
        with contextlib.suppress(OSError):
            worker.sendall(_NUMBER.pack(code))


def _tell(process: subprocess.Popen[bytes], wake: socket.socket) -> None:
    process.wait()
    wake.close()


def _serve(
    worker: socket.socket, pipe: Connection, process: subprocess.Popen[bytes], ended: socket.socket
) -> bool:
    """Give the process to `worker` and wait until one of them is gone; return whether it may be given to another."""
    may_go_on = False
    with contextlib.suppress(OSError):
        socket.send_fds(worker, [_NUMBER.pack(process.pid)], [pipe.fileno()])
        while ended not in select.select([worker, ended], [], [])[0]:
            said = worker.recv(1)
            if not said:
                return may_go_on
            if said == END:
                return False
            may_go_on = said == READY
        return False
    return may_go_on


def _next_worker(path: str, ended: socket.socket) -> socket.socket | None:
    """Wait for another worker; None if none comes in time, or the process has ended."""
    with socket.socket(socket.AF_UNIX) as door:
        try:
            door.bind(path)
            door.listen()
            ready, _, _ = select.select([door, ended], [], [], KEPT_S)
            return door.accept()[0] if door in ready and ended not in ready else None
        finally:
            with contextlib.suppress(OSError):
                os.unlink(path)


if __name__ == "__main__":
    main()
