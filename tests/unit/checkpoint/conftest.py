"""A run's folder, an engine that learned a little, and attempts at the run."""

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
    """Return a function that begins an attempt and returns its manager."""

    def begin(**section):
        number = start_attempt(store, 1)
        made = CheckpointManager(
            store, checkpoints(**{"keep_last": 9, **section}), World(), Collectives(), number
        )
        made.find_latest()
        return made

    return begin


@pytest.fixture
def quick(monkeypatch):
    """Retries without waiting."""
    monkeypatch.setattr(retry, "wait_random_exponential", lambda **_: lambda state: 0)
