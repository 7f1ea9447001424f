"""How the wall time of an attempt is spent, stored with the run as `time/000001.json`.

`dist-ft runs show` reads it. The training thread reports what it does (`TimeLedger.enter`). A
thread of rank 0 writes the record once the attempt has its number, at every save, at the end, and
every few seconds in between, so that a killed attempt leaves a record too. Time within an attempt
is measured by a monotonic clock; the wall clock is used only for its start. Guarantees: every
second between the start and the last write belongs to exactly one phase; failing storage is a
warning; a worker of an older attempt writes nothing.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from typing import Any, Literal, NotRequired, TypedDict

from dist_ft.checkpoint import attempts
from dist_ft.core.errors import Interrupted, LimitReached, StorageError
from dist_ft.core.logs import redact
from dist_ft.core.world import World
from dist_ft.storage.filesystem import Store, is_local
from dist_ft.storage.retry import retry_limit

log = logging.getLogger("dist_ft.metrics")
FOLDER = attempts.TIME
Phase = Literal["start", "compute", "evaluation", "data", "save", "other", "lost"]
PHASES: tuple[Phase, ...] = ("start", "compute", "evaluation", "data", "save", "other", "lost")
WORK_PHASES: tuple[Phase, ...] = ("compute", "evaluation", "data", "other")
"""Phases whose time is lost if the steps they belong to are repeated."""
LOCAL_WRITE_S, REMOTE_WRITE_S = 2.0, 30.0
"""Seconds between writes, apart from those at saves: to a disk, and to an object store."""
WRITE_TIMEOUT_S = 5.0
MAX_MARKS = 64


class TimeRecord(TypedDict):
    """The file of an attempt (JSON), without the attempt's number.

    Attributes:
        ended: why the attempt ended, "done" or a message; absent while it runs or if it failed.
        begun_at: start, ISO 8601 in UTC.
        resumed_at: number of steps that were done when the attempt started training.
        seconds: {phase: seconds}.
        marks: [step, seconds at that time] of the latest saves.
        committed: step of the latest checkpoint that this attempt committed in storage; absent
            before the first.
    """

    ended: NotRequired[str]
    begun_at: str
    resumed_at: int | None
    seconds: dict[Phase, float]
    marks: list[list[Any]]
    committed: NotRequired[int]


class TimeLedger:
    """How this process spends its time. It starts at once, in the phase "start".

    Attributes:
        changed: set when the record should be written soon.
        end_reason: why the attempt ended; "" while it runs.
    """

    def __init__(self) -> None:
        """Start in the phase "start"."""
        self.changed = threading.Event()
        self.end_reason = ""
        self._started_at = datetime.now(timezone.utc)
        self._seconds: dict[Phase, float] = dict.fromkeys(PHASES, 0.0)
        self._phase: Phase = "start"
        self._since_s = time.monotonic()
        self._resumed_at: int | None = None
        self._marks: dict[int, dict[Phase, float]] = {}
        self._committed: int | None = None
        self._lock = threading.Lock()

    def enter(self, phase: Phase) -> None:
        """Count time as `phase` from now on."""
        with self._lock:
            self._count_elapsed()
            self._phase = phase

    def record_resume(self, step: int) -> None:
        """Record after how many steps this attempt continues.

        The work of earlier attempts beyond that step is repeated.
        """
        with self._lock:
            self._resumed_at = step

        # Written at once: an attempt that is killed soon must show which work it repeats.
        self.changed.set()

    def start_save(self, step: int) -> None:
        """Record the time spent up to a checkpoint of `step` steps, then enter the phase "save"."""
        with self._lock:
            self._count_elapsed()
            self._marks.pop(step, None)  # so that the new mark is the last
            self._marks[step] = dict(self._seconds)
            self._phase = "save"

            # A run may save many thousand times, and the whole record is written each time.
            for old in list(self._marks)[:-MAX_MARKS]:
                del self._marks[old]

        self.changed.set()

    def record_commit(self, step: int) -> None:
        """Record that a checkpoint of `step` steps was committed in storage.

        Should it vanish, later starts say so (`checkpoint.discovery`).
        """
        with self._lock:
            self._committed = step

        self.changed.set()

    def rewind(self, step: int) -> None:
        """Count the work since `step` as lost: this attempt returns to that checkpoint."""
        with self._lock:
            self._count_elapsed()

            # Steps after the checkpoint are done again, and get new marks then.
            self._marks = {marked: spent for marked, spent in self._marks.items() if marked <= step}

            # Without a mark, the checkpoint is of an earlier attempt: all work of this one is lost.
            spent_before = self._marks.get(max(self._marks, default=-1), {})
            for phase in WORK_PHASES:
                lost_s = self._seconds[phase] - spent_before.get(phase, 0.0)
                self._seconds[phase] -= lost_s
                self._seconds["lost"] += lost_s

    def elapsed_s(self) -> float:
        """Return the seconds since the start."""
        with self._lock:
            self._count_elapsed()
            return sum(self._seconds.values())

    def to_json(self) -> TimeRecord:
        """Return the record up to now."""
        with self._lock:
            self._count_elapsed()

            # `begun_at` is a name of version 0.1.0, whose runs can still be read and resumed.
            record = TimeRecord(
                begun_at=self._started_at.isoformat(),
                resumed_at=self._resumed_at,
                seconds=_rounded(self._seconds),
                marks=[[step, _rounded(spent)] for step, spent in self._marks.items()],
            )
            if self._committed is not None:
                record["committed"] = self._committed
            if self.end_reason:
                record["ended"] = self.end_reason

            return record

    def _count_elapsed(self) -> None:
        # The caller holds the lock: the writing thread counts time too.
        now = time.monotonic()
        self._seconds[self._phase] += now - self._since_s
        self._since_s = now


def _rounded(seconds: dict[Phase, float]) -> dict[Phase, float]:
    return {phase: round(value, 3) for phase, value in seconds.items()}


@contextmanager
def write_periodically(
    ledger: TimeLedger, store: Store, attempt: int, world: World
) -> Iterator[None]:
    """Within this context, keep the record of `attempt` in the run's storage up to date.

    A thread of rank 0 writes it; the other ranks do nothing.
    """
    if world.rank != 0:
        yield
        return

    writer = _Writer(ledger, store, attempt)
    thread = threading.Thread(target=writer.run, name="time-ledger", daemon=True)
    thread.start()
    try:
        yield
        ledger.end_reason = "done"
    except (Interrupted, LimitReached) as error:  # after others an attempt may follow
        ledger.end_reason = redact(str(error))
        raise
    finally:
        # In this order: the thread wakes up at `changed`, and must then find that it is stopped. If
        # storage does not answer, the end of the run does not wait for it.
        writer.stopped.set()
        ledger.changed.set()
        thread.join(2 * WRITE_TIMEOUT_S)


class _Writer:
    def __init__(self, ledger: TimeLedger, store: Store, attempt: int) -> None:
        self.stopped = threading.Event()
        self._ledger = ledger
        self._store = store
        self._attempt = attempt
        self._every_s = LOCAL_WRITE_S if is_local(store.url) else REMOTE_WRITE_S
        self._warned = False

    def run(self) -> None:
        """Write until the attempt has ended, and once more then."""
        is_last = False
        while not is_last:
            # Both are read before the write: what changes during it causes another one.
            is_last = self.stopped.is_set()
            self._ledger.changed.clear()
            self._write()
            if not is_last:
                self._ledger.changed.wait(self._every_s)

    def _write(self) -> None:
        # One attempt: the next write comes soon, and holds all that this one did.
        try:
            with retry_limit(1, WRITE_TIMEOUT_S):
                # A worker that a newer attempt has replaced may still run for a while.
                if attempts.latest_record(self._store) <= self._attempt:
                    record = {"attempt": self._attempt, **self._ledger.to_json()}
                    self._store.write(
                        f"{FOLDER}/{self._attempt:06d}.json", json.dumps(record).encode()
                    )

            self._warned = False
        except StorageError as error:
            # Once for each outage: a warning every few seconds would bury the log.
            if not self._warned:
                log.warning("the time record of this attempt was not written: %s", error)
            self._warned = True
