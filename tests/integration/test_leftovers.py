"""A run that is killed leaves files behind; the next start removes them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import yaml

pytestmark = pytest.mark.slow

EXPECTED = tuple(f"dist_ft-{os.geteuid()}/{name}" for name in ("ray-", "torchinductor"))
"""Logs of Ray's latest ends, and a cache."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.base(tmp_path_factory.mktemp("leftovers"), 40)


@pytest.fixture
def temp() -> Iterator[Path]:
    """A temporary folder of its own, with a short path, because Ray's sockets are in it."""
    folder = Path(tempfile.mkdtemp(prefix="dfl-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def start(base: Path, name: str, temp: Path, workers: int, failpoint: str) -> subprocess.Popen[str]:
    """Start a run that makes temporary files of every kind."""
    document = tiny.config(
        base,
        name,
        workers=workers,
        log={"tensorboard": True},
        # A spare process outlives its worker for two minutes, for a worker that claims it.
        cluster={"progress_timeout_s": 300, "standby": False},
        checkpoint={"local_folder": str(base / "local"), "local_every_steps": 2},
    )
    path = base / f"{name}.yaml"
    path.write_text(yaml.safe_dump(document))
    variables = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return subprocess.Popen(
        [sys.executable, "-m", "dist_ft.cli", "train", str(path)],
        env={
            **variables,
            "TMPDIR": str(temp),
            "DIST_FT_FAILPOINT": failpoint,
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
        },
        cwd=base,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def leftovers(temp: Path, base: Path) -> list[str]:
    """Return temporary files, except those of Ray's latest ends, which explain them."""
    found = []
    for folder in (temp, base / "cache", base / "local"):
        for path in folder.rglob("*"):
            name = str(path.relative_to(folder))
            is_temporary = folder == temp or ".tmp-" in name
            if is_temporary and not name.startswith(EXPECTED):
                found.append(f"{folder.name}/{name}")
    return [name for name in found if not name.endswith(f"dist_ft-{os.geteuid()}")]


def kill_at_step(process: subprocess.Popen[str], text: str) -> None:
    """Kill the command and all it started in its session, once its output has `text`."""
    assert process.stdout is not None
    for line in process.stdout:
        if text in line:
            break
    else:
        raise AssertionError(f"ended with {process.wait()} before {text!r}")
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_killed_run_and_its_second_start_leave_nothing(base: Path, temp: Path) -> None:
    kill_at_step(start(base, "one", temp, 0, "train.step:6!sleep600"), "failpoint")
    left = leftovers(temp, base)
    assert any("tensorboard-" in name for name in left) and any("stacks-" in name for name in left)

    process = start(base, "one", temp, 0, "")
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output[-3000:]
    assert leftovers(temp, base) == []

    # Nothing in these folders is open to other users.
    for folder in (base / "cache/tokens", *(base / "local").iterdir()):
        assert folder.stat().st_mode & 0o077 == 0, folder


@pytest.mark.ray
def test_killed_run_on_ray_and_its_second_start_leave_at_most_logs(base: Path, temp: Path) -> None:
    """The driver's own kill: Ray's processes notice, and the trainers end with their workers."""
    process = start(base, "two", temp, 2, "train.step:6!sleep600")
    kill_at_step(process, "failpoint")
    until = time.monotonic() + 60
    own = f"TMPDIR={temp}".encode()
    while any(own in environment.split(b"\0") for environment in _environments()):
        assert time.monotonic() < until, "processes of the killed run stay"
        time.sleep(0.5)
    assert any("tensorboard-" in name for name in leftovers(temp, base))

    process = start(base, "two", temp, 2, "")
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output[-3000:]
    assert leftovers(temp, base) == []

    # The logs of the killed one are kept, in a folder that only this user can read.
    own_folder = temp / f"dist_ft-{os.geteuid()}"
    logs = [path for path in own_folder.iterdir() if path.is_dir()]
    assert [path.name[:4] for path in logs] == ["ray-"]
    assert own_folder.stat().st_mode & 0o077 == 0


def _environments() -> Iterator[bytes]:
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            yield path.read_bytes()
        except OSError:
            continue
