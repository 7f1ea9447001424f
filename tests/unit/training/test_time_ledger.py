"""The account of an attempt's time: every second in one phase, durable while the attempt lives, fenced."""

from __future__ import annotations

import json
import logging
import time

import pytest

from dist_ft.checkpoint import discovery
from dist_ft.core.world import World
from dist_ft.storage.filesystem import Store
from dist_ft.training import time_ledger as module
from dist_ft.training.time_ledger import TimeLedger, kept


@pytest.fixture
def now(monkeypatch) -> list[float]:
    """The steady clock, to be set."""
    at = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: at[0])
    return at


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(str(tmp_path / "run"))


def spend(clock: TimeLedger, now: list[float], *parts: tuple[str, float]) -> None:
    for phase, seconds in parts:
        clock.to(phase)
        now[0] += seconds


def read(store: Store, attempt: int = 1) -> dict:
    return json.loads(store.read(f"time/{attempt:06d}.json"))


def eventually(true) -> bool:
    until = time.time() + 10
    while not true() and time.time() < until:
        time.sleep(0.01)
    return true()


def test_every_second_is_in_one_phase(now):
    clock = TimeLedger()
    now[0] += 4
    spend(clock, now, ("data", 1), ("compute", 2), ("save", 0.5), ("data", 1), ("compute", 3))
    assert clock.account()["seconds"] == {
        "start": 4,
        "data": 2,
        "compute": 5,
        "save": 0.5,
        "evaluation": 0,
        "other": 0,
        "lost": 0,
    }


def test_marks_say_what_had_been_spent_and_only_the_newest_are_kept(now):
    clock = TimeLedger()
    clock.resume(2)
    for step in range(3, 3 + module.MOST_MARKS + 5):
        spend(clock, now, ("compute", 1))
        clock.saving(step)
    account = clock.account()
    assert account["resumed_at"] == 2 and len(account["marks"]) == module.MOST_MARKS
    step, then = account["marks"][-1]
    assert (step, then["compute"]) == (3 + module.MOST_MARKS + 4, module.MOST_MARKS + 5)


def test_going_back_moves_work_to_lost(now):
    clock = TimeLedger()
    spend(clock, now, ("compute", 5))
    clock.saving(4)
    now[0] += 1
    spend(clock, now, ("compute", 3), ("data", 1), ("evaluation", 2))
    clock.saving(8)
    spend(clock, now, ("start", 1))
    clock.rewind(4)
    account = clock.account()
    assert account["seconds"] == {
        "start": 1,
        "data": 0,
        "compute": 5,
        "save": 1,
        "evaluation": 0,
        "other": 0,
        "lost": 6,
    }
    assert [step for step, _ in account["marks"]] == [4]


def test_the_account_lies_in_storage_from_the_begin_and_is_renewed(store, monkeypatch):
    monkeypatch.setattr(module, "LOCAL_S", 0.05)
    clock = TimeLedger()
    with kept(clock, store, 1, World()):
        assert eventually(lambda: store.exists("time/000001.json"))
        before = sum(read(store)["seconds"].values())
        assert eventually(lambda: sum(read(store)["seconds"].values()) > before)
        clock.to("compute")
        time.sleep(0.02)
    assert read(store)["seconds"]["compute"] > 0


def test_a_save_is_told_at_once(store, monkeypatch):
    monkeypatch.setattr(module, "LOCAL_S", 100.0)
    clock = TimeLedger()
    with kept(clock, store, 1, World()):
        assert eventually(lambda: store.exists("time/000001.json"))
        clock.saving(7)
        assert eventually(lambda: [step for step, _ in read(store)["marks"]] == [7])


def test_other_ranks_and_older_attempts_write_nothing(store):
    with kept(TimeLedger(), store, 1, World(1, 2, 1, 2)):
        pass
    assert not store.exists("time")
    discovery.start_attempt(store, 1)
    discovery.start_attempt(store, 1)
    with kept(TimeLedger(), store, 1, World()):
        pass
    assert not store.exists("time")
    with kept(TimeLedger(), store, 2, World()):
        pass
    assert store.list("time") == ["000002.json"]


def test_failing_storage_is_told_once_and_training_goes_on(store, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(module, "LOCAL_S", 0.01)
    (tmp_path / "run").write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING, "dist_ft"), kept(TimeLedger(), store, 1, World()):
        time.sleep(0.2)
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("the account of this attempt's time was not written: ")
