"""What is stored of the attempts at a run, in `attempts/` and `time/`, as far as it can be read.

A record that is missing or damaged leaves its values unknown; it is no error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from dist_ft.checkpoint.attempts import ATTEMPTS, TIME
from dist_ft.core.errors import DocumentError, StorageError
from dist_ft.storage.documents import read_json_object
from dist_ft.storage.filesystem import Store

MAX_NUMBER = 1e12
"""Larger seconds and counts in a record are taken for damage."""


@dataclass(frozen=True)
class AttemptRecord:
    """One attempt.

    Attributes:
        number: its number.
        started_s: when it started (time.time); None if that is not known.
        spent_s: its recorded wall time.
        num_workers: its number of workers; None if that is not known.
        previous_end: why the attempt before it ended, if the same command started both; "" if a
            person or a launcher started it.
        has_ended: whether it ended as planned: complete, stopped on request, or at a limit.
    """

    number: int
    started_s: float | None
    spent_s: float
    num_workers: int | None
    previous_end: str
    has_ended: bool


def read_attempts(store: Store, num_latest: int | None = None) -> list[AttemptRecord]:
    """Return the attempts of the run at `store`, oldest first; with `num_latest` only the last.

    Raises:
        StorageError: storage cannot be listed.
    """
    numbers = sorted({*_numbers(store, ATTEMPTS), *_numbers(store, TIME)})
    if num_latest is not None:
        numbers = numbers[-num_latest:]
    return [_read_attempt(store, number) for number in numbers]


def _read_attempt(store: Store, number: int) -> AttemptRecord:
    record = _read_object(store, f"{ATTEMPTS}/{number:06d}.json")
    times = _read_object(store, f"{TIME}/{number:06d}.json")

    seconds = times.get("seconds")
    spent_s = 0.0
    if isinstance(seconds, Mapping):
        spent_s = sum(max(0.0, _number(value)) for value in seconds.values())

    # The time record starts with the process; the attempt gets its number some seconds later.
    started_s = _timestamp(times.get("begun_at"))
    if started_s is None:
        started_s = _timestamp(record.get("started_at"))

    num_workers = int(_number(record.get("world_size")))
    previous_end = record.get("after", "")
    return AttemptRecord(
        number=number,
        started_s=started_s,
        spent_s=spent_s,
        num_workers=num_workers if num_workers > 0 else None,
        previous_end=previous_end if isinstance(previous_end, str) else "",
        has_ended=bool(times.get("ended")),
    )


def _numbers(store: Store, folder: str) -> list[int]:
    """Return the numbers of the attempts that have a file in `folder`."""
    numbers = []
    for name in store.list(folder):
        number = name.removesuffix(".json")
        # isdigit alone accepts digits that int rejects.
        if name.endswith(".json") and number.isascii() and number.isdigit():
            numbers.append(int(number))
    return numbers


def _read_object(store: Store, path: str) -> Mapping[str, Any]:
    """Return the JSON object in a file; {} if it is missing or damaged."""
    try:
        return read_json_object(store, path)
    except (DocumentError, StorageError):
        return {}


def _number(value: Any) -> float:
    """Return a number as it is, and anything else as 0."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not abs(value) < MAX_NUMBER:
        return 0.0
    return float(value)


def _timestamp(value: Any) -> float | None:
    try:
        return datetime.fromisoformat(value).timestamp()
    except (TypeError, ValueError, OverflowError, OSError):
        return None
