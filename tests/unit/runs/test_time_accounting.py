"""The time that `dist-ft runs show` reports for a run."""

from __future__ import annotations

import json

from dist_ft.runs import time_accounting
from dist_ft.storage.filesystem import Store


def time_file(attempt: int, at: str, resumed_at: int, compute: float, marks: list) -> bytes:
    seconds = {
        "start": 3.0,
        "compute": compute,
        "evaluation": 0.0,
        "data": 0.5,
        "save": 0.5,
        "other": 0.0,
        "lost": 0.0,
    }
    return json.dumps(
        {
            "attempt": attempt,
            "begun_at": at,
            "resumed_at": resumed_at,
            "seconds": seconds,
            "marks": [[step, {"compute": then}] for step, then in marks],
        }
    ).encode()


def test_lines_sum_over_two_attempts(tmp_path):
    store = Store(str(tmp_path))
    store.write("time/000001.json", time_file(1, "2026-01-01T00:00:00+00:00", 0, 16.0, [[4, 12.0]]))
    store.write("time/000002.json", time_file(2, "2026-01-01T01:01:20+01:00", 4, 16.0, []))
    printed = list(time_accounting.lines(store))
    assert printed[0] == "0:01:40 over 2 attempts, 100.0% attributed"
    assert [line.split()[:3] for line in printed[1:]] == [
        ["compute", "28.0%", "28.0"],
        ["evaluation", "0.0%", "0.0"],
        ["data", "0.5%", "0.5"],
        ["save", "1.0%", "1.0"],
        ["start", "6.0%", "6.0"],
        ["restart", "60.0%", "60.0"],
        ["lost", "4.5%", "4.5"],
        ["other", "0.0%", "0.0"],
    ]


def test_no_files_give_no_lines_and_an_unreadable_file_is_named(tmp_path):
    store = Store(str(tmp_path))
    assert list(time_accounting.lines(store)) == []
    store.write("time/000001.json", b"{")
    store.write("time/000002.json", b'{"attempt": 2}')
    printed = list(time_accounting.lines(store))
    assert [line.split(" (")[0] for line in printed] == [
        "time/000001.json cannot be read",
        "time/000002.json cannot be read",
    ]
