"""Runs cases in forked processes, some at a time, each with a limit of time.

The process that calls this has imported everything, so that a case takes milliseconds. A case that
hangs is ended after its stacks were printed; one that takes too long next to others is tried again
alone, as the machine may have been busy.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, NamedTuple

from fuzz import sandbox
from fuzz.inputs import Case, Input
from fuzz.judge import MAX_SECONDS, Outcome
from fuzz.materials import Materials

POLL_S = 0.004
STACKS_S = 0.4
"""Time to print the stacks of a process that hangs."""


class Finished(NamedTuple):
    """A case and how it ended."""

    case: Case
    outcome: Outcome


@dataclass
class _Running:
    """A case in progress.

    Attributes:
        pid: its process.
        root: its folder.
        logs: files with its stdout, its stderr and its reports.
        started_s: when it started (`time.monotonic`).
        is_retry: it timed out before, next to another.
        ended_for_time: it was ended.
        seconds, status, usage: how long it took, and what `wait4` returned; set at its end.
    """

    case: Case
    pid: int
    root: Path
    logs: list[IO[bytes]]
    started_s: float = field(default_factory=time.monotonic)
    is_retry: bool = False
    ended_for_time: bool = False
    seconds: float = 0.0
    status: int = 0
    usage: resource.struct_rusage | None = None


class Pool:
    """Runs cases; `folder` holds the cases that are in progress."""

    def __init__(
        self, materials: Materials, folder: Path, jobs: int, max_seconds: float = MAX_SECONDS
    ) -> None:
        self._materials = materials
        self._folder = folder
        self._jobs = jobs
        self._max_seconds = max_seconds
        self._count = 0
        self._own_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def run(self, cases: Iterable[Case]) -> Iterator[Finished]:
        """Yield each case when it has ended."""
        waiting = iter(cases)
        again: deque[Case] = deque()
        running: dict[int, _Running] = {}
        is_empty = False

        while True:
            while not is_empty and len(running) < self._jobs:
                case = next(waiting, None)
                if case is None:
                    is_empty = True
                else:
                    started = self._start(case)
                    running[started.pid] = started

            # Alone, after all others.
            if is_empty and not running and again:
                started = self._start(again.popleft())
                started.is_retry = True
                running[started.pid] = started
            if not running:
                return

            for started in self._wait(running):
                outcome = self._finish(started)
                if outcome.timed_out and not started.is_retry and self._jobs > 1:
                    again.append(started.case)
                else:
                    yield Finished(started.case, outcome)

    def run_one(self, item: Input) -> Outcome:
        """Return how one input ends, alone."""
        started = self._start(Case("", "", item))
        running = {started.pid: started}
        while not self._wait(running):
            pass
        return self._finish(started)

    def _start(self, case: Case) -> _Running:
        self._count += 1
        root = self._folder / f"case-{self._count}"
        project = root / "home" / "project"
        project.mkdir(parents=True)
        self._materials.copy(case.input.materials, project)
        case.input.write_files(project)

        names = ("stdout", "stderr", "reports")
        logs = [open(self._folder / f"{root.name}-{name}", "w+b") for name in names]  # noqa: SIM115
        descriptors = [log.fileno() for log in logs]
        # What is still in this buffer would be written by the case as well.
        sys.stdout.flush()
        pid = os.fork()
        if not pid:
            try:
                # `run` never returns: the code below belongs to the parent.
                reporter = sandbox.Reporter(descriptors[2])
                sandbox.run(case.input, root, reporter, (descriptors[0], descriptors[1]))
            except BaseException as error:
                os.write(descriptors[1], f"the sandbox failed: {error!r}\n".encode())
            finally:
                os._exit(97)
        return _Running(case, pid, root, logs)

    def _wait(self, running: dict[int, _Running]) -> list[_Running]:
        """Return the cases that have ended, after a short while."""
        ended = []
        for pid, started in list(running.items()):
            done, status, usage = os.wait4(pid, os.WNOHANG)
            if not done and time.monotonic() - started.started_s > self._max_seconds:
                started.ended_for_time = True
                _end(pid)
                _, status, usage = os.wait4(pid, 0)
                done = pid
            if done:
                started.status, started.usage = status, usage
                started.seconds = time.monotonic() - started.started_s
                ended.append(running.pop(pid))

        if not ended:
            time.sleep(POLL_S)
        return ended

    def _finish(self, started: _Running) -> Outcome:
        """Read what a case left, and remove it."""
        texts = []
        for log in started.logs:
            log.seek(0)
            texts.append(log.read(2**22).decode(errors="replace"))
            log.close()
            os.unlink(log.name)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(started.pid, signal.SIGKILL)  # what it may have started
        saved = sorted((started.root / "tmp").glob("dist-ft-*.log"))
        log_text = saved[0].read_text(errors="replace") if saved else ""
        shutil.rmtree(started.root, ignore_errors=True)

        reports: dict[str, list[str]] = {"outside": [], "problem": [], "guard": []}
        for line in texts[2].splitlines():
            for key, text in json.loads(line).items():
                reports[key].append(text)

        usage = started.usage
        assert usage is not None
        return Outcome(
            code=os.waitstatus_to_exitcode(started.status),
            stdout=texts[0],
            stderr=texts[1],
            seconds=started.seconds,
            cpu_s=usage.ru_utime + usage.ru_stime,
            growth_bytes=usage.ru_maxrss * 1024 - self._own_bytes,
            timed_out=started.ended_for_time,
            outside=tuple(reports["outside"]),
            problems=tuple(reports["problem"]),
            guards=tuple(reports["guard"]),
            log=log_text,
        )


def _end(pid: int) -> None:
    """End a process that takes too long; its stacks are on its stderr."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGUSR1)
        time.sleep(STACKS_S)
        os.kill(pid, signal.SIGKILL)
