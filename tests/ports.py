"""Free ports of this machine that nothing else takes by chance before they are used."""

from __future__ import annotations

import itertools
import os
import socket

FIRST_PORT, RANGE_SIZE = 20_000, 1_000
"""Below the ports that the kernel assigns (from 32768), and above those of Ray's workers (to
19999)."""
_next = itertools.count(os.getpid() % RANGE_SIZE)


def find_free_port() -> int:
    """Return a port without a listener; each of several test processes has its own range."""
    worker = int("".join(filter(str.isdigit, os.environ.get("PYTEST_XDIST_WORKER", "0"))))
    for _ in range(RANGE_SIZE):
        port = FIRST_PORT + RANGE_SIZE * (worker % 12) + next(_next) % RANGE_SIZE
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError("no free port")
