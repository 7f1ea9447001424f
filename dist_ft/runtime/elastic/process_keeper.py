"""Keeps a spare process alive for its worker or, if that is lost, for the next one on the node.

When a node is lost Ray ends the workers on all other nodes too and places new ones. Their spare
processes, with all their imports, would be lost with them. So the parent of a process is not the
worker but a keeper: a process that imports little and is no child of the worker.
Guarantees: a process that has started training ends with its worker, whatever either does (its
keeper kills it, and the kernel does if the keeper dies); a process that has not may be claimed by
one other worker of the same user, run and node within `UNCLAIMED_S` seconds, and is killed after
that.
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
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection, Pipe

from dist_ft.core.private_folders import user_folder

log = logging.getLogger("dist_ft.keeper")
UNCLAIMED_S = 120.0
"""How long a process lives without a worker."""
ANSWER_S = 30.0
"""How long a worker waits for its keeper, or for a process that closed its pipe to end."""

# From worker to keeper, one byte each:
CLAIMABLE = b"c"
BOUND = b"b"
KILL = b"k"

_NUMBER = struct.Struct("i")
"""From keeper to worker: the process id, later the exit code."""


class KeptProcess:
    """A process with a keeper, as the worker that holds it sees it.

    Attributes:
        pid: its process id.
        pipe: the worker's end of the pipe to it.
    """

    def __init__(self, keeper: socket.socket) -> None:
        """Receive the process from its keeper.

        Raises:
            OSError: the keeper ended, or gave the process to another worker.
        """
        self._keeper = keeper
        keeper.settimeout(ANSWER_S)

        # The pipe comes as a descriptor in the message: the worker is no parent of the process, so
        # it cannot inherit one.
        answer, descriptors, _, _ = socket.recv_fds(keeper, _NUMBER.size, 1)
        if len(answer) < _NUMBER.size or not descriptors:
            keeper.close()
            raise ConnectionError("the process is not available")

        (self.pid,) = _NUMBER.unpack(answer)

        # Otherwise processes that the worker starts later would hold the pipe open too.
        os.set_inheritable(descriptors[0], False)
        self.pipe = Connection(descriptors[0])

    def allow_claim(self) -> None:
        """Let another worker claim it, if this one is lost: its setup is complete."""
        self._send(CLAIMABLE)

    def bind_to_worker(self) -> None:
        """Have it end with this worker from now on."""
        self._send(BOUND)

    def wait(self) -> int:
        """Return the exit code (negative: signal) of a process that has closed its pipe.

        If it does not end within `ANSWER_S` it is killed. If its keeper was killed, the process was
        killed too.
        """
        # First without force, then after a kill: it may close its pipe and stay.
        for _ in range(2):
            with contextlib.suppress(OSError):
                self._keeper.settimeout(ANSWER_S)
                answer = self._keeper.recv(_NUMBER.size, socket.MSG_WAITALL)
                if len(answer) == _NUMBER.size:
                    return int(_NUMBER.unpack(answer)[0])

                # No number: the keeper was killed, and the kernel killed the process with it.
                return -signal.SIGKILL
            self._send(KILL)

        return -signal.SIGKILL

    def kill(self) -> None:
        """Kill it, whatever it does, and wait until it has ended."""
        self._send(KILL)

        # The keeper closes the socket last, after the process has ended.
        with contextlib.suppress(OSError):
            self._keeper.settimeout(ANSWER_S)
            while self._keeper.recv(_NUMBER.size):
                pass

        self._keeper.close()
        self.pipe.close()

    def _send(self, message: bytes) -> None:
        with contextlib.suppress(OSError):
            self._keeper.sendall(message)


def start(command: Sequence[str], environment: dict[str, str], name: str) -> KeptProcess:
    """Start `command`, with the descriptor of its pipe as last argument.

    `name` says who may claim the process later.

    Raises:
        OSError: the system starts no process.
    """
    # This module runs as a program in a session of its own: signals to the worker's process group,
    # such as Ctrl-C, do not reach it.
    ours, theirs = socket.socketpair()
    with theirs:
        keeper = subprocess.Popen(
            [
                sys.executable,
                "-m",
                __name__,
                str(theirs.fileno()),
                _socket_path_prefix(name),
                *command,
            ],
            pass_fds=[theirs.fileno()],
            start_new_session=True,
            env=environment,
        )

    try:
        keeper.wait(ANSWER_S)  # it forks: the child stays, and this process exits at once
    except subprocess.TimeoutExpired as error:
        keeper.kill()
        raise TimeoutError("no process can be started") from error

    return KeptProcess(ours)


def claim(name: str) -> KeptProcess | None:
    """Return a process that waits under `name` and has no worker, or None."""
    folder, prefix = os.path.split(_socket_path_prefix(name))
    if not folder:
        return None

    _remove_old_sockets(folder)
    for entry in sorted(os.listdir(folder)):
        if not entry.startswith(prefix):
            continue

        # Several workers may try one socket: its keeper accepts the first connection only.
        keeper = socket.socket(socket.AF_UNIX)
        try:
            keeper.settimeout(ANSWER_S)
            keeper.connect(os.path.join(folder, entry))
            return KeptProcess(keeper)
        except OSError:  # another worker was first, its time is over, or it was killed
            keeper.close()
            _remove_stale_socket(folder, entry)
    return None


def _remove_old_sockets(folder: str) -> None:
    """Remove sockets that are older than any keeper waits: their keepers were killed."""
    for entry in os.scandir(folder):
        with contextlib.suppress(OSError):
            status = entry.stat(follow_symlinks=False)
            age_s = time.time() - status.st_mtime
            if stat.S_ISSOCK(status.st_mode) and age_s > 2 * UNCLAIMED_S:
                os.unlink(entry.path)


def _remove_stale_socket(folder: str, entry: str) -> None:
    """Remove the socket of a keeper that no longer runs."""
    # A keeper removes its own socket, unless it was killed. Its id is the end of the name.
    keeper_pid = entry.rpartition("-")[2]
    with contextlib.suppress(OSError, ValueError):
        try:
            os.kill(int(keeper_pid), 0)  # signal 0 only checks that the process exists
        except ProcessLookupError:
            os.unlink(os.path.join(folder, entry))


def _socket_path_prefix(name: str) -> str:
    """Return the start of the socket paths of processes of this name; hashed to be short.

    Returns "" if others may write to the folder: then no process can be claimed.
    """
    # The pipe carries pickles: whoever can place a socket here could run code in the worker.
    folder = user_folder()
    if folder is None:
        log.warning(
            "%s/dist_ft-%d is not a folder that only this user can access: later workers cannot "
            "reuse spare processes",
            tempfile.gettempdir(),
            os.geteuid(),
        )
        return ""

    return str(folder / (hashlib.sha256(name.encode()).hexdigest()[:16] + "-"))


def main() -> None:
    """Start the process and keep it; the arguments are those that `start` passes."""
    descriptor, socket_prefix, *command = sys.argv[1:]
    if os.fork():
        os._exit(0)  # Ray kills the children of a worker that it ends: the keeper has no parent

    # The process must not inherit it: by a closed socket the worker notices that the keeper ended.
    worker = socket.socket(fileno=int(descriptor))
    worker.set_inheritable(False)

    pipe, theirs = Pipe()
    process = subprocess.Popen(
        [*command, str(theirs.fileno())], pass_fds=[theirs.fileno()], start_new_session=True
    )
    theirs.close()

    # The process decides what these mean. Ignored only now, because a child inherits it.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)

    # `select` waits for sockets, not for processes: `ended` is readable once the process has ended.
    ended, ended_writer = socket.socketpair()
    threading.Thread(target=_close_at_end, args=(process, ended_writer), daemon=True).start()

    try:
        while _serve_worker(worker, pipe, process, ended) and socket_prefix:
            next_worker = _wait_for_next_worker(f"{socket_prefix}{os.getpid()}", ended)
            if next_worker is None:
                break
            worker = next_worker
    finally:
        # Whatever happened here, the process does not outlive its keeper.
        process.kill()
        code = process.wait()
        with contextlib.suppress(OSError):
            worker.sendall(_NUMBER.pack(code))


def _close_at_end(process: subprocess.Popen[bytes], writer: socket.socket) -> None:
    process.wait()
    writer.close()


def _serve_worker(
    worker: socket.socket, pipe: Connection, process: subprocess.Popen[bytes], ended: socket.socket
) -> bool:
    """Give the process to `worker` until one of them ends; return whether it is claimable."""
    is_claimable = False
    with contextlib.suppress(OSError):
        socket.send_fds(worker, [_NUMBER.pack(process.pid)], [pipe.fileno()])
        while ended not in select.select([worker, ended], [], [])[0]:
            message = worker.recv(1)
            if not message:
                return is_claimable
            if message == KILL:
                return False
            is_claimable = message == CLAIMABLE

        return False

    # The connection broke, which is the loss of the worker as well.
    return is_claimable


def _wait_for_next_worker(path: str, ended: socket.socket) -> socket.socket | None:
    """Return the next worker's connection; None if none comes in time, or the process has ended."""
    with socket.socket(socket.AF_UNIX) as listener:
        try:
            listener.bind(path)
            listener.listen()
            ready, _, _ = select.select([listener, ended], [], [], UNCLAIMED_S)

            # One connection per listener: further workers are refused once it is closed.
            if listener in ready and ended not in ready:
                return listener.accept()[0]
            return None
        finally:
            # Before it is closed, so that no worker finds a name without a keeper.
            with contextlib.suppress(OSError):
                os.unlink(path)


if __name__ == "__main__":
    main()
