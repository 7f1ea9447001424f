"""How the attempts of a run spent their wall time, read from its storage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any, NamedTuple, TypedDict, cast

from dist_ft.core.errors import StorageError
from dist_ft.planning import goodput
from dist_ft.planning.goodput import AttemptTime
from dist_ft.storage.documents import read_json_object
from dist_ft.storage.filesystem import Store
from dist_ft.training import time_ledger
from dist_ft.training.console import format_duration

MAX_SECONDS = 1e12
"""Seconds that a part of a run may have taken; a larger number, or NaN, is damage."""
DAMAGED = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)
"""What reading a damaged record raises."""


class AttemptTimes(NamedTuple):
    """The time of each attempt, and a line for each file that cannot be read."""

    attempts: list[AttemptTime]
    unreadable: list[str]


def read_attempt_times(store: Store) -> AttemptTimes:
    """Return the time of all attempts of the run at `store`."""
    attempts = []
    unreadable = []

    # Names are padded numbers, so attempts come in order.
    for name in store.list(time_ledger.FOLDER):
        path = f"{time_ledger.FOLDER}/{name}"
        try:
            note = read_json_object(store, path)

            # "begun_at" is the name in the stored format, which attempts of 0.1.0 share.
            attempt = AttemptTime(
                int(note["attempt"]),
                datetime.fromisoformat(note["begun_at"]).timestamp(),
                _count(note["resumed_at"]),
                _seconds(note["seconds"]),
                tuple((int(step), _seconds(seconds)) for step, seconds in note["marks"]),
            )
        except (StorageError, *DAMAGED) as error:
            # One bad file must not hide the time of all other attempts.
            unreadable.append(f"{path} cannot be read ({type(error).__name__}: {error})")
            continue

        attempts.append(attempt)

    return AttemptTimes(attempts, unreadable)


def _count(value: Any) -> int | None:
    return None if value is None else int(value)


def _seconds(values: Mapping[str, Any]) -> dict[str, float]:
    """Return seconds by part; raises ValueError for what no clock measures."""
    seconds = {}
    for part, value in values.items():
        seconds[part] = float(value)
        if not abs(seconds[part]) < MAX_SECONDS:
            raise ValueError(f"{part} took {value} s")
    return seconds


class StoredTime(TypedDict, total=False):
    """A file of time as `training.time_ledger` writes it, as far as it is read here.

    Attributes:
        attempt: number of the attempt.
        ended: how the attempt ended; absent while it runs.
    """

    attempt: int
    ended: str


def read_stored_time(store: Store, name: str) -> StoredTime:
    """Return one file of time as it was written; {} if it cannot be read now."""
    # Called while the run may be writing: a store without atomic writes can show half a file, and
    # the next poll reads it again.
    try:
        note = read_json_object(store, f"{time_ledger.FOLDER}/{name}")
    except (ValueError, StorageError):
        return {}
    return cast(StoredTime, note)


def lines(store: Store) -> Iterator[str]:
    """Yield where the wall time of a run went: a total, then one line for each part."""
    times = read_attempt_times(store)
    yield from times.unreadable
    if not times.attempts:
        return

    seconds = goodput.time_by_part(times.attempts)
    wall_s = sum(seconds.values())
    num_attempts = len(times.attempts)
    plural = "" if num_attempts == 1 else "s"
    yield (
        f"{format_duration(wall_s)} over {num_attempts} attempt{plural}, "
        f"{goodput.attributed_share(seconds):.1%} attributed"
    )

    # All parts, also those of 0 s: that a run lost nothing is worth a line.
    for part, meaning in goodput.PARTS.items():
        share = seconds[part] / wall_s if wall_s else 0
        yield f"{part:<10} {share:6.1%} {seconds[part]:12,.1f} s  {meaning}"


def mean_save_stall_s(attempts: list[AttemptTime]) -> float | None:
    """Return the mean seconds that training stood still for a save, in the first attempt.

    The last save is left out: it may be the save at the end, which training waits for. None with
    fewer than two saves.
    """
    marks = attempts[0].marks if attempts else ()
    if len(marks) < 2:
        return None

    # A mark holds the time up to the start of its save, so the last one covers all saves but its
    # own.
    _, seconds_at_last_save = marks[-1]
    return seconds_at_last_save.get("save", 0.0) / (len(marks) - 1)
