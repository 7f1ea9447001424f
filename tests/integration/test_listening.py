"""A run on this machine listens on loopback only; what it leaves open is in `EXCEPTIONS`."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import job_cluster
import listening
import pytest
import tiny
import yaml

pytestmark = pytest.mark.ray

EXCEPTIONS: dict[str, str] = {}
"""Part of a process's command line -> why it may listen elsewhere. See docs/threat-model.md."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.base(tmp_path_factory.mktemp("listening"), 40)


@pytest.fixture
def temp() -> Iterator[Path]:
    """A temporary folder of its own, with a short path, because Ray's sockets are in it."""
    folder = Path(tempfile.mkdtemp(prefix="dfl-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def observe(process: subprocess.Popen[str], mark: str) -> set[listening.Listener]:
    """Return all listeners of the processes with `mark` until `process` ends."""
    found: set[listening.Listener] = set()
    until = time.monotonic() + 240
    while process.poll() is None:
        assert time.monotonic() < until
        found |= listening.listeners(mark)
        time.sleep(0.2)
    return found


def environment(mark: str, temp: Path) -> dict[str, str]:
    variables = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return {
        **variables,
        listening.MARK: mark,
        "TMPDIR": str(temp),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
    }


def require_loopback(found: set[listening.Listener]) -> None:
    open_ones = [
        listener
        for listener in found
        if not listener.is_loopback and not any(part in listener.program for part in EXCEPTIONS)
    ]
    assert not open_ones, "\n".join(map(str, sorted(open_ones, key=str)))


def test_two_workers_on_this_machine_listen_on_loopback_only(base: Path, temp: Path) -> None:
    """Ray's control store, raylet, agents and workers, torch's store, and gloo."""
    document = tiny.config(
        base, "two", workers=2, schedule={"epochs": 1}, log={"tensorboard": True}
    )
    path, mark = base / "two.yaml", secrets.token_hex(8)
    path.write_text(yaml.safe_dump(document))
    process = subprocess.Popen(
        [sys.executable, "-m", "dist_ft.cli", "train", str(path)],
        env=environment(mark, temp),
        cwd=base,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    found = observe(process, mark)
    assert process.stdout is not None
    output = process.stdout.read()
    assert process.returncode == 0 and "2 workers" in output, output[-3000:]

    # All of them were seen: an empty list would be loopback too.
    programs = " ".join(listener.program for listener in found)
    for part in ("gcs_server", "raylet", "worker_process", "ray::", "dist_ft.cli"):
        assert part in programs, f"{part}: {programs}"
    require_loopback(found)

    # What Ray left in the temporary folder is private, and gone after a run that succeeded.
    own = temp / f"dist_ft-{os.geteuid()}"
    assert [item.name for item in temp.iterdir()] == [own.name] and own.stat().st_mode & 0o077 == 0
    assert {item.name for item in own.iterdir()} <= {"torchinductor"}  # a cache


@pytest.mark.slow
def test_cluster_of_the_launch_folder_listens_on_loopback_only(base: Path) -> None:
    """A head, a worker node and a job that trains on them."""
    mark = secrets.token_hex(8)
    with job_cluster.cluster(**{listening.MARK: mark}) as cluster:
        project = base / "project"
        tiny.base(project, 40)
        document = tiny.config(Path("."), "job", workers=2, schedule={"epochs": 1})
        document["run"]["storage"] = str(base / "runs")
        (project / "run.yaml").write_text(yaml.safe_dump(document))
        submitted = cluster.start("submit", "run.yaml", cwd=project, out=base / "submit.out")
        found = observe(submitted.process, mark)
        assert submitted.process.returncode == 0, (
            submitted.stdout[-3000:] + submitted.stderr[-2000:]
        )
    assert sum("raylet" in listener.program for listener in found) >= 2
    assert any("worker_process" in listener.program for listener in found)
    require_loopback(found)
