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
            pytest.skip(f"needs {path} of the shared folder, which is not at {shared_folder()} (set DIST_FT_SHARED)")
        return found

    return find


@pytest.fixture(scope="session")
def root() -> Path:
    """Return the project's root folder."""
    return ROOT
