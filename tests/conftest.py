"""Fixtures of all tests."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def shared_folder() -> Path:
    """Return where the shared models and data lie: DIST_FT_SHARED, or ../shared from the project's root."""
    return Path(os.environ.get("DIST_FT_SHARED") or ROOT.parent / "shared")


@pytest.fixture(scope="session")
def shared() -> Callable[[str], Path]:
    """Return a function from a path below the shared folder to that file; absent ones skip the test, saying so."""

    def find(path: str) -> Path:
        found = shared_folder() / path
        if not found.exists():
            pytest.skip(
                f"needs {path} of the shared folder, which is not at {shared_folder()} (set DIST_FT_SHARED)"
            )
        return found

    return find


@pytest.fixture(scope="session")
def root() -> Path:
    """Return the project's root folder."""
    return ROOT


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest files, so that with two test processes none is left alone with them at the end."""
    first = {"test_ray.py": 0, "faults": 1, "integration": 2}
    items.sort(key=lambda item: first.get(item.path.name, first.get(item.path.parent.name, 3)))
