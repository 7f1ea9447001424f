"""The time record of an attempt: each second in one phase, stored while it runs, fenced."""

from __future__ import annotations

import json
import logging
import time

import pytest

from dist_ft.checkpoint import discovery
from dist_ft.checkpoint.attempts import committed_step
from dist_ft.core.world import World
from dist_ft.storage.filesystem import Store
from dist_ft.training import time_ledger as module
from dist_ft.training.time_ledger import TimeLedger, write_periodically


@pytest.fixture
def now(monkeypatch) -> list[float]:
    """The monotonic clock, to be set."""
    at = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: at[0])
    return at


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(str(tmp_path / "run"))


def spend(ledger: TimeLedger, now: list[float], *phases: tuple[str, float]) -> None:
    for phase, seconds in phases:
        ledger.enter(phase)
        now[0] += seconds


def read(store: Store, attempt: int = 1) -> dict:
    return json.loads(store.read(f"time/{attempt:06d}.json"))


def eventually(true) -> bool:
    until = time.time() + 10
    while not true() and time.time() < until:
        time.sleep(0.01)
    return true()


def test_every_second_is_in_one_phase(now):
    ledger = TimeLedger()
    now[0] += 4
    spend(ledger, now, ("data", 1), ("compute", 2), ("save", 0.5), ("data", 1), ("compute", 3))
    assert ledger.to_json()["seconds"] == {
        "start": 4,
        "data": 2,
        "compute": 5,
        "save": 0.5,
        "evaluation": 0,
        "other": 0,
        "lost": 0,
    }


def test_marks_hold_the_time_spent_and_only_the_latest_are_stored(now):
    ledger = TimeLedger()
    ledger.record_resume(2)
    for step in range(3, 3 + module.MAX_MARKS + 5):
        spend(ledger, now, ("compute", 1))
        ledger.start_save(step)
    record = ledger.to_json()
    assert record["resumed_at"] == 2 and len(record["marks"]) == module.MAX_MARKS
    step, then = record["marks"][-1]
    assert (step, then["compute"]) == (3 + module.MAX_MARKS + 4, module.MAX_MARKS + 5)


def test_rewind_moves_work_to_lost(now):
    ledger = TimeLedger()
    spend(ledger, now, ("compute", 5))
    ledger.start_save(4)
    now[0] += 1
    spend(ledger, now, ("compute", 3), ("data", 1), ("evaluation", 2))
    ledger.start_save(8)
    spend(ledger, now, ("start", 1))
    ledger.rewind(4)
    record = ledger.to_json()
    assert record["seconds"] == {
        "start": 1,
        "data": 0,
        "compute": 5,
        "save": 1,
        "evaluation": 0,
        "other": 0,
        "lost": 6,
    }
    assert [step for step, _ in record["marks"]] == [4]


def test_record_is_stored_from_the_start_and_updated(store, monkeypatch):
    monkeypatch.setattr(module, "LOCAL_WRITE_S", 0.05)
    ledger = TimeLedger()
    with write_periodically(ledger, store, 1, World()):
        assert eventually(lambda: store.exists("time/000001.json"))
        before = sum(read(store)["seconds"].values())
        assert eventually(lambda: sum(read(store)["seconds"].values()) > before)
        ledger.enter("compute")
        time.sleep(0.02)
    assert read(store)["seconds"]["compute"] > 0


def test_save_is_recorded_at_once(store, monkeypatch):
    monkeypatch.setattr(module, "LOCAL_WRITE_S", 100.0)
    ledger = TimeLedger()
    with write_periodically(ledger, store, 1, World()):
        assert eventually(lambda: store.exists("time/000001.json"))
        ledger.start_save(7)
        assert eventually(lambda: [step for step, _ in read(store)["marks"]] == [7])


def test_commit_is_recorded_at_once(store, monkeypatch):
    """By it a later start notices that the checkpoint has vanished."""
    monkeypatch.setattr(module, "LOCAL_WRITE_S", 100.0)
    ledger = TimeLedger()
    with write_periodically(ledger, store, 1, World()):
        assert eventually(lambda: store.exists("time/000001.json"))
        assert "committed" not in read(store)
        ledger.record_commit(7)
        assert eventually(lambda: read(store).get("committed") == 7)
    assert committed_step(store) == committed_step(store, 1) == 7 and committed_step(store, 2) == 0


def test_other_ranks_and_older_attempts_write_nothing(store):
    with write_periodically(TimeLedger(), store, 1, World(1, 2, 1, 2)):
        pass
    assert not store.exists("time")
    discovery.start_attempt(store, 1)
    discovery.start_attempt(store, 1)
    with write_periodically(TimeLedger(), store, 1, World()):
        pass
    assert not store.exists("time")
    with write_periodically(TimeLedger(), store, 2, World()):
        pass
    assert store.list("time") == ["000002.json"]


def test_failing_storage_is_logged_once_and_training_continues(
    store, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(module, "LOCAL_WRITE_S", 0.01)
    (tmp_path / "run").write_text("a file where the folder should be")
    with (
        caplog.at_level(logging.WARNING, "dist_ft"),
        write_periodically(TimeLedger(), store, 1, World()),
    ):
        time.sleep(0.2)
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("the time record of this attempt was not written: ")
