"""Searches for real: trials on a local Ray, early stopping, Optuna, a kill and the same command again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import history
import pytest
import tiny_tasks
import yaml

from dist_ft.config.search import load_search
from dist_ft.runtime import local
from dist_ft.storage.filesystem import Store

pytestmark = [pytest.mark.slow, pytest.mark.ray]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_tasks.base(tmp_path_factory.mktemp("tune"))
    document = tiny_tasks.config(
        folder, "sequence_classification", "x", checkpoint={"every_steps": 4, "best_by": "loss"}
    )
    document["evaluation"]["every_steps"] = 4
    (folder / "base.yaml").write_text(yaml.safe_dump(document))
    return folder


def write(base: Path, name: str, /, **fields: Any) -> str:
    path = base / f"{name}.yaml"
    path.write_text(yaml.safe_dump({**fields, "name": name}))
    return str(path)


def start(base: Path, file: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dist_ft.cli", "tune", str(base / "base.yaml"), file],
        capture_output=True,
        text=True,
        timeout=500,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
    )


def report(base: Path, name: str) -> dict[str, Any]:
    return json.loads((base / "runs" / name / "search.json").read_text())


GRID = {
    "search": "grid",
    "max_concurrent": 2,
    "space": {"optimizer.learning_rate": [5e-3, 1e-9], "run.seed": [1, 2]},
}


@pytest.fixture(scope="module")
def grid(base: Path) -> dict[str, Any]:
    done = start(base, write(base, "grid", **GRID))
    assert done.returncode == 0, done.stderr
    return report(base, "grid")


def test_each_trial_of_a_grid_equals_the_same_run_alone(base: Path, grid: dict[str, Any]) -> None:
    assert [one["state"] for one in grid["trials"]] == ["done"] * 4
    assert {one["trial"] for one in grid["trials"][:2]} == {0, 1}, (
        "trials that train are better than the one that does not"
    )
    assert {"search.md", "search.png", "trials.json"} <= set(
        Store(str(base / "runs" / "grid")).list()
    )
    search = load_search(str(base / "base.yaml"), str(base / "grid.yaml"))
    alone = search.config(search.section.point(1), 1)
    alone = alone.model_copy(update={"run": alone.run.model_copy(update={"name": "alone"})})
    local.run(alone)
    assert history.losses(base / "runs" / "grid-t1") == history.losses(base / "runs" / "alone")


def test_a_killed_search_resumes_unfinished_trials(base: Path, grid: dict[str, Any]) -> None:
    """The first trial is stopped dead in its second, with the search itself; nothing that is over runs again."""
    file = write(base, "killed", **{**GRID, "max_concurrent": 1})
    process = subprocess.Popen(
        [sys.executable, "-m", "dist_ft.cli", "tune", str(base / "base.yaml"), file],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("trial 1: step 4"):
            process.kill()
    process.wait()
    before = json.loads((base / "runs" / "killed" / "trials.json").read_text())["trials"]
    assert [one["state"] for one in before] == ["done", "running"]
    again = start(base, file)
    assert again.returncode == 0, again.stderr
    assert "trial 0: step" not in again.stdout
    assert len(Store(str(base / "runs" / "killed-t0")).list("attempts")) == 1
    for number in range(4):
        assert history.losses(base / "runs" / f"killed-t{number}") == history.losses(
            base / "runs" / f"grid-t{number}"
        )
    assert [(one["trial"], one["loss"]) for one in report(base, "killed")["trials"]] == [
        (one["trial"], one["loss"]) for one in grid["trials"]
    ]


def test_asha_stops_weak_trials(base: Path) -> None:
    file = write(
        base,
        "asha",
        search="grid",
        max_concurrent=1,
        space={"optimizer.learning_rate": [5e-3, 4e-3, 1e-9, 2e-9]},
        asha={"grace_steps": 8, "reduction": 2},
    )
    assert start(base, file).returncode == 0
    trials = {one["trial"]: one for one in report(base, "asha")["trials"]}
    assert trials[0]["state"] == "done", "the first has none before it to fall behind"
    assert all(
        trials[number]["state"] == "stopped" and trials[number]["step"] == 8 for number in (2, 3)
    )


def test_optuna_suggests_values_and_a_failed_trial_is_reported(base: Path) -> None:
    file = write(
        base,
        "tpe",
        search="optuna",
        trials=4,
        max_concurrent=1,
        space={
            "optimizer.learning_rate": {"low": 1e-4, "high": 1e-2, "log": True},
            "tuning.method": ["full", "partial"],
        },
    )
    refused = start(base, file)
    assert (
        refused.returncode == 2
        and "tuning.method=partial: no weights to train are named" in refused.stderr
    )
    file = write(
        base,
        "tpe",
        search="optuna",
        trials=4,
        max_concurrent=1,
        space={
            "optimizer.learning_rate": {"low": 1e-4, "high": 1e-2, "log": True},
            "model.path": [str(base / "bert"), str(base / "nothing")],
        },
    )
    done = start(base, file)
    assert done.returncode == 0, done.stderr
    found = report(base, "tpe")
    assert [len(found["trials"]), found["best"] is not None] == [4, True]
    for one in found["trials"]:
        broken = one["values"]["model.path"].endswith("nothing")
        assert one["state"] == ("failed" if broken else "done")
        assert ("the folder does not exist" in one["error"]) == broken
    assert len({one["values"]["optimizer.learning_rate"] for one in found["trials"]}) == 4
    more = write(base, "tpe", **{**yaml.safe_load(Path(file).read_text()), "trials": 5})
    assert start(base, more).returncode == 0
    assert len([one for one in report(base, "tpe")["trials"] if one["state"] == "done"]) >= len(
        [one for one in found["trials"] if one["state"] == "done"]
    )
