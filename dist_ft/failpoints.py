"""Named places where a test can stop the process: `DIST_FT_FAILPOINT=name[:n][@rank][!how]` at the n-th passing.

Without the variable a failpoint costs one dictionary look-up. By default the process is killed: nothing gets to clean
up, as with a lost machine. `!stop` stops it (SIGSTOP), `!lock` holds the interpreter lock for good, `!fault` touches
memory that is not there, `!memory` asks for more memory than there is, `!raise` is a bug (RuntimeError).
"""

from __future__ import annotations

import os
import signal
from collections import Counter

_passed: Counter[str] = Counter()


def hit(name: str, rank: int = 0) -> None:
    """Fail here if the environment asks for it (`name`, `name:3` for the third passing, `name:3@1` on rank 1 only)."""
    wanted = os.environ.get("DIST_FT_FAILPOINT")
    if not wanted:
        return
    wanted, _, how = wanted.partition("!")
    place, _, only = wanted.partition("@")
    place, _, count = place.partition(":")
    if place != name or (only and int(only) != rank):
        return
    _passed[name] += 1
    once = os.environ.get("DIST_FT_FAILPOINT_ONCE")
    if _passed[name] == int(count or 1) and _first_time(once):
        _fail(how)


def _fail(how: str) -> None:
    if how == "lock":
        import ctypes

        ctypes.PyDLL(None).sleep(10**6)
    if how == "memory":
        bytearray(2**47)
    if how == "raise":
        raise RuntimeError("failpoint")
    os.kill(os.getpid(), {"stop": signal.SIGSTOP, "fault": signal.SIGSEGV}.get(how, signal.SIGKILL))


def _first_time(marker: str | None) -> bool:
    """Return whether no process died at this failpoint yet (`marker` is a file that remembers it)."""
    if marker is None:
        return True
    try:
        os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True
