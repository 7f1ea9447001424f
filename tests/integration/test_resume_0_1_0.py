"""Runs that version 0.1.0 left half-way resume with this version, equal to the last bit.

`tests/fixtures/make_0_1_0.py` made the runs and recorded what 0.1.0 itself reached when it resumed them.
"""

from __future__ import annotations

import fcntl
import json
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fixtures import make_0_1_0 as made

ARCHIVE = Path(made.__file__).with_name("runs_0_1_0.tar.xz")


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """Unpack the fixture where it was made; two test processes take turns."""
    lock = made.FOLDER.with_suffix(".lock")
    with lock.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        shutil.rmtree(made.FOLDER, ignore_errors=True)
        with tarfile.open(ARCHIVE) as archive:
            archive.extractall(made.FOLDER, filter="data")
        yield made.FOLDER
        shutil.rmtree(made.FOLDER)


def configs() -> dict[str, dict[str, Any]]:
    """Return the configs of the runs as this version spells them."""
    return made.configs()


@pytest.mark.parametrize("name", made.RUNS)
def test_run_of_0_1_0_resumes_bit_equal(folder, name):
    expected = json.loads((folder / "expected.json").read_text())[name]
    attempts_before = len(list((folder / "runs" / name / "attempts").iterdir()))

    assert made.start(folder, name, configs()[name]) == [0] * made.RUNS[name]

    assert made.reached(folder / "runs" / name) == expected
    assert len(list((folder / "runs" / name / "attempts").iterdir())) == attempts_before + 1
