"""Fixtures: a run's folder, an engine trained for one step, and attempts at the run."""

from __future__ import annotations

import pytest
from unit.small import checkpoints, make_engine, train

from dist_ft.checkpoint.discovery import start_attempt
from dist_ft.checkpoint.manager import CheckpointManager
from dist_ft.core.world import Collectives, World
from dist_ft.storage import retry
from dist_ft.storage.filesystem import Store


@pytest.fixture
def store(tmp_path):
    return Store(str(tmp_path / "run"))


@pytest.fixture(scope="module")
def engine():
    engine = make_engine()
    train(engine, range(1))
    return engine


@pytest.fixture
def attempt(store):
    """Return a function that starts an attempt and returns its manager."""

    def start(**section):
        number = start_attempt(store, 1)
        manager = CheckpointManager(
            store, checkpoints(**{"keep_last": 9, **section}), World(), Collectives(), number
        )
        manager.find_latest()
        return manager

    return start


@pytest.fixture
def quick(monkeypatch):
    """Retries without waiting."""
    monkeypatch.setattr(retry, "wait_random_exponential", lambda **_: lambda state: 0)
