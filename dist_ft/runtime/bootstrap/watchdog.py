"""Ends a worker that makes no progress, and stores the stacks of its threads.

A collective whose peer is gone, a driver call that never returns, a stopped process: without this,
all ranks wait. Two timers: a thread that logs what happened, stores the stacks with the run and
ends the process; and, some seconds later, the C thread of `faulthandler`, which needs no
interpreter lock. Restarting is for the launcher: Ray, torchrun, or a person.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import IO

from dist_ft.checkpoint import discovery
from dist_ft.core import scratch
from dist_ft.core.errors import StorageError
from dist_ft.core.world import World
from dist_ft.storage.filesystem import Store
from dist_ft.storage.retry import retry_limit
from dist_ft.training.callbacks import Callback

log = logging.getLogger("dist_ft.watchdog")
EXIT_CODE = 75
"""By this exit code a supervisor recognizes a hang."""
SECOND_TIMER_DELAY_S = 15.0
"""How long the second timer waits for the first one to report."""
UPLOAD_S = 10.0
"""How long the upload of the stacks may take; less than the delay of the second timer."""


class Watchdog(Callback):
    """Watches one worker of one attempt; `on_progress` reports progress.

    `timeout_s` 0 watches nothing.
    """

    def __init__(
        self,
        store: Store,
        attempt: int,
        world: World,
        timeout_s: float,
        on_hang: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._on_hang = on_hang
        self._store = store
        self._name = stacks_name(attempt, world.rank)
        self._rank = world.rank
        self._timeout_s = timeout_s
        self._progress_s = self._armed_s = 0.0
        self._ended = threading.Event()
        self._file: IO[bytes] | None = None
        self._folder: scratch.Scratch | None = None

    def __enter__(self) -> Watchdog:
        if self._timeout_s:
            # faulthandler opens no files: it needs the descriptor of one.
            self._folder = scratch.create("stacks")
            self._file = open(self._folder.path / "stacks.txt", "w+b")
            self.on_progress()
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        if self._file is not None:
            faulthandler.cancel_dump_traceback_later()
            self._file.close()
        if self._folder is not None:
            self._folder.remove()

    def on_progress(self) -> None:
        """Note that the training thread made progress: a step, a batch of an evaluation, a save."""
        self._progress_s = time.monotonic()

        # Arming starts a thread each time, so it is done at most once a second.
        if self._file is not None and self._progress_s - self._armed_s > 1:
            self._armed_s = self._progress_s
            # To stderr: nobody could fetch the file, which this timer cannot upload.
            faulthandler.dump_traceback_later(
                self._timeout_s + SECOND_TIMER_DELAY_S, file=sys.__stderr__ or self._file, exit=True
            )

    def _watch(self) -> None:
        while not self._ended.wait(min(1.0, self._timeout_s / 10)):
            silent_s = time.monotonic() - self._progress_s
            if silent_s > self._timeout_s:
                self._end(silent_s)

    def _end(self, silent_s: float) -> None:
        """Store the stacks, log what happened, end the process."""
        assert self._file is not None
        # Local first: storage may be what hangs.
        faulthandler.dump_traceback(self._file, all_threads=True)

        where = "in its log"
        try:
            with retry_limit(1, UPLOAD_S):
                self._store.write(self._name, open(self._file.name, "rb").read())  # noqa: SIM115
            where = f"at {self._store.redacted_url(self._name)}"
        except (StorageError, OSError):
            faulthandler.dump_traceback(sys.__stderr__ or self._file, all_threads=True)

        # The stacks are where `where` says; nothing runs after `os._exit` that could remove these.
        if self._folder is not None:
            self._folder.remove()

        log.error(
            "rank %d made no progress for %.0f s (cluster.progress_timeout_s=%g): a peer may be "
            "gone or stopped, or a call does not return. This worker ends. Started again, the run "
            "resumes from its latest checkpoint. Stacks of all threads are %s",
            self._rank,
            silent_s,
            self._timeout_s,
            where,
        )
        with contextlib.suppress(Exception):
            self._on_hang(
                f"no progress for {silent_s:.0f} s (cluster.progress_timeout_s="
                f"{self._timeout_s:g}): the process ends; stacks of its threads are {where}"
            )
        logging.shutdown()

        # Not `sys.exit`: that ends this thread only, and the training thread never returns.
        os._exit(EXIT_CODE)


def stacks_name(attempt: int, rank: int) -> str:
    """Return the file in the run's storage with the stacks of a worker that hung."""
    return f"{discovery.ATTEMPTS}/{attempt:06d}-rank-{rank:05d}-stacks.txt"
