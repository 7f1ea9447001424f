"""`runs watch` follows files that grow, are rewound, and report the end of the run."""

from __future__ import annotations

import json

import pytest

from dist_ft.config.load import STORED
from dist_ft.core.errors import DataError
from dist_ft.runs import watch_run
from dist_ft.storage.filesystem import Store
from dist_ft.training import time_ledger
from dist_ft.training.metrics_log import FILE


def write_metrics(store: Store, steps: range, ended: str = "", at: float = 1.0) -> None:
    store.write(
        FILE,
        b"".join(
            json.dumps(
                {
                    "step": step,
                    "kind": "train",
                    "loss": 6.0 / step,
                    "learning_rate": 1e-3,
                    "at": at,
                    "tokens_per_s": 1000.0,
                    "step_s": 0.5,
                }
            ).encode()
            + b"\n"
            for step in steps
        ),
    )
    store.write(
        f"{time_ledger.FOLDER}/000001.json",
        json.dumps({"attempt": 1, **({"ended": ended} if ended else {})}).encode(),
    )


@pytest.fixture
def store(tmp_path):
    store = Store(str(tmp_path))
    store.write(STORED, b"run: {name: r}")
    return store


def test_watch_follows_the_run_until_it_ends(store, monkeypatch):
    write_metrics(store, range(1, 3))
    after = iter([(range(1, 4), ""), (range(1, 3), ""), (range(1, 5), "done")])
    monkeypatch.setattr(watch_run.time, "sleep", lambda _: write_metrics(store, *next(after)))
    printed: list[str] = []
    assert watch_run.watch(store.url, False, printed.append) == "the run has ended: done"
    assert printed[0] == "step 1  loss 6.0000  lr 1.00e-03  1,000 tok/s  0.50 s/step"
    assert [line.split("  ")[0] for line in printed] == [
        "step 1",
        "step 2",
        "step 3",
        "-- resumed from a checkpoint; metrics end at step 2 --",
        "step 3",
        "step 4",
    ]


def test_watch_returns_at_once_or_after_silence_or_refuses_what_is_no_run(store, tmp_path):
    write_metrics(store, range(1, 2))
    printed: list[str] = []
    assert (
        watch_run.watch(store.url, True, printed.append).startswith("the run has not ended")
        and len(printed) == 1
    )
    assert "the run has written nothing for 0 s" in watch_run.watch(
        store.url, False, printed.append, 0.01, 0.05
    )
    with pytest.raises(DataError, match="not a run"):
        watch_run.watch(str(tmp_path / "none"), True, printed.append)
