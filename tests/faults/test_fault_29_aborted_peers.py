"""Fault 29: healthy workers that abort, as NCCL's watchdog makes them, on a real Ray cluster."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import history
import pytest
import ranks
import tiny
import yaml

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.base(tmp_path_factory.mktemp("aborted"), samples=70)


@pytest.fixture(scope="module")
def unbroken(base: Path) -> list[float]:
    folder = base / "ranks-unbroken"
    ranks.require_ok(ranks.run_ranks(2, [document(base, "unbroken")], folder), folder)
    return history.losses(base / "runs/unbroken")


def document(base: Path, name: str) -> dict[str, Any]:
    return tiny.config(base, name, workers=2, checkpoint={"every_steps": 0})


def train(base: Path, name: str, failpoints: str) -> subprocess.CompletedProcess[str]:
    """Run `dist-ft train` on a Ray of its own; each failpoint fails once."""
    path = base / f"{name}.yaml"
    path.write_text(yaml.safe_dump(document(base, name)))
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    return subprocess.run(
        [sys.executable, "-m", "dist_ft.cli", "train", str(path)],
        env={
            **environment,
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            "DIST_FT_FAILPOINT": failpoints,
            "DIST_FT_FAILPOINT_ONCE": str(base / f"{name}-once"),
        },
        cwd=base,
        capture_output=True,
        text=True,
        timeout=400,
    )


def ends(run: Path) -> list[str]:
    """Return why the attempts of a run ended, except the last."""
    notes = [json.loads(path.read_text()) for path in sorted((run / "attempts").glob("*.json"))]
    return [note["after"] for note in notes[1:]]


def test_fault_29_aborts_of_two_workers_in_succession(base: Path, unbroken: list[float]) -> None:
    ended = train(base, "twice", "train.step:3@0!abort;train.step:6@1!abort")
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-3000:]
    assert history.losses(base / "runs/twice") == unbroken
    history.require_exactly_once(base / "runs/twice", document(base, "twice"))
    first, second = ends(base / "runs/twice")
    assert first.startswith("worker 0 ") and "by SIGABRT" in first
    assert second.startswith("worker 1 ") and "by SIGABRT" in second


def test_fault_29_peers_that_abort_after_a_death_twice(base: Path, unbroken: list[float]) -> None:
    failpoints = "train.step:3@1;worker.peer_lost@0!abort;train.step:6@0;worker.peer_lost@1!abort"
    ended = train(base, "deaths", failpoints)
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-3000:]
    assert history.losses(base / "runs/deaths") == unbroken
    for end, rank in zip(ends(base / "runs/deaths"), (1, 0), strict=True):
        assert end.startswith(f"worker {rank} ") and "killed (by SIGKILL, from outside)" in end


def test_a_deterministic_segfault_still_ends_the_run(base: Path) -> None:
    path = base / "segfault.yaml"
    path.write_text(yaml.safe_dump(document(base, "segfault")))
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    ended = subprocess.run(
        [sys.executable, "-m", "dist_ft.cli", "train", str(path), "cluster.max_failures=-1"],
        env={
            **environment,
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            "DIST_FT_FAILPOINT": "train.step:3@1!fault",
        },
        cwd=base,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert ended.returncode == 1, ended.stdout[-2000:] + ended.stderr[-3000:]
    assert ended.stderr.splitlines()[-1].startswith(
        "dist-ft: the same failure repeated without a new checkpoint in between (worker 1 on node "
    )
    assert "crash (by SIGSEGV)" in ended.stderr.splitlines()[-1]
    assert len(ends(base / "runs/segfault")) == 2, "three attempts"
