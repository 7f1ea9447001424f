"""Named places where a test or a drill can stop the process: `DIST_FT_FAILPOINT=name[:n][@rank][!how]`, n-th passing
(`*`: each).

Without the variable a failpoint costs one dictionary look-up. By default the process is killed: nothing gets to clean
up, as with a lost machine. `!stop` stops it (SIGSTOP), `!term` asks it to end (SIGTERM), `!lock` holds the interpreter
lock for good, `!sleep` does nothing for good (`!sleep5`: for 5 s), `!fault` touches memory that is not there, `!memory`
asks for more memory than there is, `!storage` is storage that fails (StorageError), `!raise` is a bug (RuntimeError);
`!sleep5+stop` is one after the other. A failpoint says so first.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections import Counter

from dist_ft.core.errors import StorageError

log = logging.getLogger("dist_ft.core.fault_injection")
VARIABLES = ("DIST_FT_FAILPOINT", "DIST_FT_FAILPOINT_ONCE")
_SIGNALS = {"stop": signal.SIGSTOP, "term": signal.SIGTERM, "fault": signal.SIGSEGV}
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
    if count == "*" or (_passed[name] == int(count or 1) and _first_time(once)):
        if count != "*" or _passed[name] == 1:
            log.warning("failpoint %s: %s", name, how or "kill")
        for one in how.split("+"):
            _fail(one)


def environment() -> dict[str, str]:
    """Return what this process was asked, for one on another machine."""
    return {name: os.environ[name] for name in VARIABLES if name in os.environ}


def _fail(how: str) -> None:
    if how.startswith("sleep"):
        return time.sleep(float(how.removeprefix("sleep") or 10**6))
    if how == "lock":
        import ctypes

        ctypes.PyDLL(None).sleep(10**6)
    if how == "memory":
        bytearray(2**47)
    if how == "storage":
        raise StorageError("failpoint: storage fails")
    if how == "raise":
        raise RuntimeError("failpoint")
    return os.kill(os.getpid(), _SIGNALS.get(how, signal.SIGKILL))


def _first_time(marker: str | None) -> bool:
    """Return whether no process died at this failpoint yet (`marker` is a file that remembers it)."""
    if marker is None:
        return True
    try:
        os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True
