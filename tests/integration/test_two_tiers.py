"""Local checkpoints on two real ranks under ZeRO: a restart resumes from them, or from storage if one is lost."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import history
import pytest
import ranks
import tiny


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.base(tmp_path_factory.mktemp("tiers"), samples=70)


def document(base: Path, name: str, stage: int) -> dict[str, Any]:
    return tiny.config(
        base,
        name,
        workers=2,
        stage=stage,
        schedule={"epochs": None, "steps": 60},
        checkpoint={
            "every_steps": 20,
            "local_folder": str(base / "node"),
            "local_every_steps": 1,
            "when_busy": "wait",
        },
    )


def steps(run: Path, folder: str) -> list[int]:
    """Return the committed steps of one tier, latest first."""
    return sorted(
        (int(path.parent.name.split("-")[1]) for path in run.glob(f"{folder}/*/manifest.json")),
        reverse=True,
    )


def killed(base: Path, config: dict[str, Any]) -> int:
    """Kill both ranks once the nodes have a newer checkpoint than storage; return the step of the one in storage."""
    name = config["run"]["name"]
    run, processes = base / "runs" / name, ranks.start_ranks(2, [config], base / name)
    while (
        not steps(run, "checkpoints")
        or steps(run, "node-checkpoints")[:1] <= steps(run, "checkpoints")[:1]
    ):
        assert all(process.poll() is None for process in processes), (
            base / name / "rank-0.log"
        ).read_text()[-2000:]
        time.sleep(0.01)
    for process in processes:
        process.kill()
    ranks.wait_for_death(processes)
    return steps(run, "checkpoints")[0]


@pytest.mark.parametrize(
    "stage", [pytest.param(0, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow), 3]
)
def test_a_kill_loses_only_steps_after_the_local_checkpoint(base: Path, stage: int) -> None:
    """A restart resumes from local checkpoints; if the files of rank 1 are lost, from storage."""
    names = [f"{what}-{stage}" for what in ("whole", "kept", "lost")]
    whole, kept, lost = (document(base, name, stage) for name in names)
    folder = base / f"first-{stage}"
    ranks.require_ok(ranks.run_ranks(2, [whole], folder), folder)
    in_storage = [killed(base, config) for config in (kept, lost)]
    there = next((base / "node").glob(f"{names[2]}-*"))
    for path in there.glob("*/rank-00001-*"):
        path.unlink()
    again = base / f"again-{stage}"
    ranks.require_ok(ranks.run_ranks(2, [kept, lost], again), again)
    said = (again / "rank-0.log").read_text()
    first, second = map(int, re.findall(r"resuming from step (\d+)", said))
    assert first > in_storage[0] and second == in_storage[1]
    assert "local checkpoint" in said and "is skipped" in said
    for config in (kept, lost):
        run = base / "runs" / config["run"]["name"]
        assert history.losses(run) == history.losses(base / "runs" / names[0])
        history.require_exactly_once(run, config)
    assert [path.name for path in (base / "node").glob("*/*")] == [], (
        "a checkpoint in storage is in no other tier"
    )
