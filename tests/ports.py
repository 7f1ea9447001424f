"""Ports of this machine that nothing takes by chance between being chosen and being used."""

from __future__ import annotations

import itertools
import os
import socket

FIRST, EACH = 20_000, 1_000
"""Below what the kernel hands out to whoever asks for any port (from 32768) and above Ray's workers (to 19999)."""
_next = itertools.count(os.getpid() % EACH)


def free() -> int:
    """Return a port that nobody listens on; each of several test processes has a range of its own."""
    worker = int("".join(filter(str.isdigit, os.environ.get("PYTEST_XDIST_WORKER", "0"))))
    for _ in range(EACH):
        port = FIRST + EACH * (worker % 12) + next(_next) % EACH
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError("no free port")
