"""A run is watched while its files grow, go back, and say that it has ended."""

from __future__ import annotations

import json

import pytest

from dist_ft.config.load import STORED
from dist_ft.core.errors import DataError
from dist_ft.runs import watch_run
from dist_ft.storage.filesystem import Store
from dist_ft.training import time_ledger
from dist_ft.training.metrics_log import FILE


def written(store: Store, steps: range, ended: str = "", at: float = 1.0) -> None:
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


def test_it_follows_until_the_end(store, monkeypatch):
    written(store, range(1, 3))
    after = iter([(range(1, 4), ""), (range(1, 3), ""), (range(1, 5), "done")])
    monkeypatch.setattr(watch_run.time, "sleep", lambda _: written(store, *next(after)))
    said: list[str] = []
    assert watch_run.watch(store.url, False, said.append) == "the run has ended: done"
    assert said[0] == "step 1  loss 6.0000  lr 1.00e-03  1,000 tok/s  0.50 s/step"
    assert [line.split("  ")[0] for line in said] == [
        "step 1",
        "step 2",
        "step 3",
        "-- it has gone back to a checkpoint; its metrics go up to step 2 --",
        "step 3",
        "step 4",
    ]


def test_once_and_silence_and_no_run(store, tmp_path):
    written(store, range(1, 2))
    said: list[str] = []
    assert (
        watch_run.watch(store.url, True, said.append).startswith("the run has not ended")
        and len(said) == 1
    )
    assert "nothing was heard of the run for 0 s" in watch_run.watch(
        store.url, False, said.append, 0.01, 0.05
    )
    with pytest.raises(DataError, match="is no run"):
        watch_run.watch(str(tmp_path / "none"), True, said.append)
