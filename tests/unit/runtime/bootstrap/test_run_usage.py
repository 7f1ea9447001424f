"""What attempts used, from records that are whole, torn, or lost."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from typing import Any
from uuid import uuid4

import pytest

from dist_ft.planning.run_limits import Usage
from dist_ft.runtime.bootstrap.run_usage import read_usage
from dist_ft.storage.filesystem import Store

START_S = 1_700_000_000.0


@pytest.fixture
def store() -> Store:
    return Store(f"memory://usage-{uuid4().hex}")


def at(seconds: float) -> str:
    return datetime.fromtimestamp(START_S + seconds, timezone.utc).isoformat()


def write(store: Store, path: str, value: Any) -> None:
    content = value if isinstance(value, bytes) else json.dumps(value).encode()
    store.write(path, content)


def write_attempt(store: Store, number: int, start_s: float, size: int, after: str = "") -> None:
    record = {"attempt": number, "world_size": size, "started_at": at(start_s + 5)}
    if after:
        record["after"] = after
    write(store, f"attempts/{number:06d}.json", record)


def write_time(store: Store, number: int, start_s: float, spent: dict[str, float]) -> None:
    record = {"attempt": number, "begun_at": at(start_s), "seconds": spent, "marks": []}
    write(store, f"time/{number:06d}.json", record)


def test_run_without_attempts_used_nothing(store: Store) -> None:
    assert read_usage(store, 4) == Usage(0, 0, 0)


def test_all_attempts_count_with_their_workers_and_automatic_restarts(store: Store) -> None:
    # Attempt 2 follows the failure of attempt 1 by itself; attempt 3 was started by a person.
    write_attempt(store, 1, 0, 4)
    write_time(store, 1, 0, {"start": 10, "compute": 80, "lost": 10})
    write_attempt(store, 2, 130, 2, after="worker 1 on node a: killed (by SIGKILL)")
    write_time(store, 2, 130, {"compute": 50})
    write_attempt(store, 3, 9000, 1)
    write_time(store, 3, 9000, {"compute": 7})
    assert read_usage(store, 8) == Usage(130 + 50 + 7, 4 * 130 + 2 * 50 + 7, 3)

    # The next process starts 3 s after the last sign of life of attempt 3, by itself.
    restarted = read_usage(store, 8, restarted_s=START_S + 9010)
    assert restarted == Usage(130 + 50 + 10, 4 * 130 + 2 * 50 + 10, 3)


@pytest.mark.parametrize(
    "damaged", [b"", b"{", b"[1]", b"\xff\xfe", b'{"seconds": 3}', b'{"seconds": {"compute": "x"}}']
)
def test_damaged_records_count_as_nothing(store: Store, damaged: bytes) -> None:
    write_attempt(store, 1, 0, 2)
    write_time(store, 1, 0, {"compute": 60})
    write_attempt(store, 2, 100, 2)
    write(store, "time/000002.json", damaged)
    write(store, "attempts/000003.json", damaged)
    write(store, "attempts/notes.json", b"by a user")
    assert read_usage(store, 2) == Usage(60, 120, 3)


def test_lost_attempt_records_leave_the_time(store: Store) -> None:
    write_time(store, 1, 0, {"compute": 60, "save": -5, "data": float("1e300")})
    assert read_usage(store, 3) == Usage(60, 180, 1), "with the workers of now"


def test_attempt_that_left_no_time_counts_until_its_restart(store: Store) -> None:
    write_attempt(store, 1, 0, 2)
    write_attempt(store, 2, 40, 2, after="worker 0 on node a: crash (by SIGSEGV)")
    assert read_usage(store, 2).seconds == 40


def test_clocks_that_contradict_each_other_count_no_negative_time(store: Store) -> None:
    write_attempt(store, 1, 500, 1)
    write_time(store, 1, 500, {"compute": 60})
    write_attempt(store, 2, 0, 1, after="worker 0 on node a: lost (a worker was lost)")
    write_time(store, 2, 0, {"compute": 1})
    assert read_usage(store, 1).seconds == 61
