"""Where the wall time of an attempt goes, kept with the run as `time/000001.json` for `dist-ft runs show`.

The training thread says what it is doing (`Clock.to`); a thread of rank 0 writes the account when the attempt has its
number, at every save, at the end, and every few seconds between, so that a killed attempt leaves one too. Within an
attempt time is measured by a steady clock; the machine's own clock says only when it began. Guarantees: every second
between begin and last writing is in exactly one phase; failing storage is a warning; a worker of an older attempt
writes nothing.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from typing import Any, Literal

from dist_ft.checkpoint import discovery
from dist_ft.core.errors import Interrupted, StorageError
from dist_ft.core.logs import redact
from dist_ft.core.world import World
from dist_ft.storage.filesystem import Store, is_local
from dist_ft.storage.retry import retry_limit

log = logging.getLogger("dist_ft.metrics")
FOLDER = "time"
Phase = Literal["start", "compute", "evaluation", "data", "save", "other", "lost"]
PHASES: tuple[Phase, ...] = ("start", "compute", "evaluation", "data", "save", "other", "lost")
WORK: tuple[Phase, ...] = ("compute", "evaluation", "data", "other")
"""What has to be done again if the steps it was spent on are."""
LOCAL_S, REMOTE_S = 2.0, 30.0
"""Seconds between writings, besides those at saves: to a disk, and to an object store."""
PATIENCE_S = 5.0
MOST_MARKS = 64


class TimeLedger:
    """What this process spends its time on; it begins at once, in phase "start"."""

    def __init__(self) -> None:
        self.news = threading.Event()
        """Set when an account should be written soon."""
        self._begun_at = datetime.now(timezone.utc)
        self._seconds: dict[Phase, float] = dict.fromkeys(PHASES, 0.0)
        self._phase: Phase = "start"
        self.ended = ""
        self._since = time.monotonic()
        self._resumed_at: int | None = None
        self._marks: dict[int, dict[Phase, float]] = {}
        self._lock = threading.Lock()

    def to(self, phase: Phase) -> None:
        """Count time as `phase` from now on."""
        with self._lock:
            self._settle()
            self._phase = phase

    def resume(self, step: int) -> None:
        """Note after how many steps this attempt goes on: what earlier ones did beyond them is done again."""
        with self._lock:
            self._resumed_at = step
        self.news.set()

    def saving(self, step: int) -> None:
        """A checkpoint of `step` steps begins: note how much time they took, and count as "save" from now on."""
        with self._lock:
            self._settle()
            self._marks.pop(step, None)
            self._marks[step] = dict(self._seconds)
            self._phase = "save"
            for old in list(self._marks)[:-MOST_MARKS]:
                del self._marks[old]
        self.news.set()

    def rewind(self, step: int) -> None:
        """This attempt itself goes back to `step`: the work since then counts as lost."""
        with self._lock:
            self._settle()
            self._marks = {done: spent for done, spent in self._marks.items() if done <= step}
            kept = self._marks.get(max(self._marks, default=-1), {})
            for phase in WORK:
                redone = self._seconds[phase] - kept.get(phase, 0.0)
                self._seconds[phase] -= redone
                self._seconds["lost"] += redone

    def account(self) -> dict[str, Any]:
        """Return all that is known up to now, as JSON takes it."""
        with self._lock:
            self._settle()
            return {
                **({"ended": self.ended} if self.ended else {}),
                "begun_at": self._begun_at.isoformat(),
                "resumed_at": self._resumed_at,
                "seconds": _rounded(self._seconds),
                "marks": [[step, _rounded(spent)] for step, spent in self._marks.items()],
            }

    def _settle(self) -> None:
        now = time.monotonic()
        self._seconds[self._phase] += now - self._since
        self._since = now


def _rounded(seconds: dict[Phase, float]) -> dict[str, float]:
    return {phase: round(value, 3) for phase, value in seconds.items()}


@contextmanager
def kept(clock: TimeLedger, store: Store, attempt: int, world: World) -> Iterator[None]:
    """Within, keep the account of `attempt` up to date in the run's storage (rank 0's does it, beside training)."""
    if world.rank != 0:
        yield
        return
    keeper = _Keeper(clock, store, attempt)
    thread = threading.Thread(target=keeper.run, name="account", daemon=True)
    thread.start()
    try:
        yield
        clock.ended = "done"
    except Interrupted as error:  # what else goes wrong may be followed by a further attempt
        clock.ended = redact(str(error))
        raise
    finally:
        keeper.ended.set()
        clock.news.set()
        thread.join(2 * PATIENCE_S)


class _Keeper:
    def __init__(self, clock: TimeLedger, store: Store, attempt: int) -> None:
        self.ended = threading.Event()
        self._clock = clock
        self._store = store
        self._attempt = attempt
        self._every_s = LOCAL_S if is_local(store.url) else REMOTE_S
        self._told = False

    def run(self) -> None:
        """Write until the attempt has ended, and once more then."""
        last = False
        while not last:
            last = self.ended.is_set()
            self._clock.news.clear()
            self._write()
            if not last:
                self._clock.news.wait(self._every_s)

    def _write(self) -> None:
        try:
            with retry_limit(1, PATIENCE_S):
                if discovery.latest_attempt(self._store) <= self._attempt:
                    account = {"attempt": self._attempt, **self._clock.account()}
                    self._store.write(
                        f"{FOLDER}/{self._attempt:06d}.json", json.dumps(account).encode()
                    )
            self._told = False
        except StorageError as error:
            if not self._told:
                log.warning("the account of this attempt's time was not written: %s", error)
            self._told = True
