"""Failpoints: named places in the code where a test or a drill can make the process fail.

`DIST_FT_FAILPOINT=name[:n][@rank][!action]` fails at the n-th hit of `name` (default: the first;
`*`: each), on one rank or on all. By default the process is killed (SIGKILL) without any cleanup,
like a lost machine. Other actions, which are joined with `+`, as in `!sleep5+stop`:

    stop      stop the process (SIGSTOP)
    term      request its end (SIGTERM)
    lock      hold the interpreter lock forever
    sleep     sleep forever (sleep5: for 5 s)
    fault     access invalid memory (SIGSEGV)
    abort     abort (SIGABRT), as NCCL's watchdog does
    memory    allocate more memory than the machine has
    storage   raise StorageError, as failing storage does
    raise     raise RuntimeError, as a bug does

A failpoint logs a warning first. With `DIST_FT_FAILPOINT_ONCE=<file>` it fails once over all
processes that share the file. Several failpoints are separated by semicolons; each fails once then
(the file of the second is `<file>.1`). Without the variable a failpoint costs one dictionary
look-up.
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
FOREVER_S = 10**6

_SIGNALS = {
    "stop": signal.SIGSTOP,
    "term": signal.SIGTERM,
    "fault": signal.SIGSEGV,
    "abort": signal.SIGABRT,
}
_num_hits: Counter[str] = Counter()


def hit(name: str, rank: int = 0) -> None:
    """Fail here if the environment says so: see the module's docstring."""
    specifications = os.environ.get("DIST_FT_FAILPOINT")
    if not specifications:
        return

    once = os.environ.get("DIST_FT_FAILPOINT_ONCE")
    for index, specification in enumerate(specifications.split(";")):
        suffix = f".{index}" if index > 0 else ""
        marker = None if once is None else once + suffix
        _hit_one(specification.strip(), name, rank, name + suffix, marker)


def _hit_one(specification: str, name: str, rank: int, counter: str, marker: str | None) -> None:
    target, _, actions = specification.partition("!")
    target, _, only_rank = target.partition("@")
    target, _, count = target.partition(":")
    if target != name or (only_rank and int(only_rank) != rank):
        return

    # Only now: hits of other failpoints and ranks do not count.
    _num_hits[counter] += 1
    num_hits = _num_hits[counter]
    is_due = count == "*"
    if not is_due and num_hits == int(count or 1):
        # The marker is created by the check itself, so it comes last.
        is_due = _is_first_time(marker)
    if not is_due:
        return

    # Logged before the process dies. A failpoint in every step would flood the log.
    if count != "*" or num_hits == 1:
        log.warning("failpoint %s: %s", name, actions or "kill")

    for action in actions.split("+"):
        _fail(action)


def environment() -> dict[str, str]:
    """Return this process's failpoint variables, for a process on another machine."""
    return {name: os.environ[name] for name in VARIABLES if name in os.environ}


def _fail(action: str) -> None:
    if action.startswith("sleep"):
        time.sleep(float(action.removeprefix("sleep") or FOREVER_S))
        return

    if action == "lock":
        import ctypes

        # Unlike CDLL, PyDLL keeps the interpreter lock during a call, so every thread stops.
        ctypes.PyDLL(None).sleep(FOREVER_S)
    if action == "memory":
        # 128 TiB, all of a process's address space: MemoryError, without touching a page.
        bytearray(2**47)
    if action == "storage":
        raise StorageError("failpoint: storage fails")
    if action == "raise":
        raise RuntimeError("failpoint")

    # SIGKILL runs no handler and no `finally`, as when the machine is lost.
    os.kill(os.getpid(), _SIGNALS.get(action, signal.SIGKILL))


def _is_first_time(marker: str | None) -> bool:
    """Whether no process failed here before; the file `marker` records it."""
    if marker is None:
        return True

    # O_EXCL lets one of several processes create the file, also if they get here at once.
    try:
        os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True
