"""Checkpoints on the nodes, on two real ranks under ZeRO: a restart goes on from them, or, where one is lost, from storage."""

from __future__ import annotations

import shutil
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
    return tiny.config(base, name, workers=2, stage=stage, checkpoint={
        "every_steps": 6, "node_folder": str(base / "node"), "node_every_steps": 1, "when_busy": "wait"})


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_kill_between_two_checkpoints_costs_only_what_the_nodes_have_not(base: Path, stage: int) -> None:
    """Killed at step 11: storage has step 6, the nodes 9 or 10. Then the same with the files of rank 1 gone."""
    names = [f"{what}-{stage}" for what in ("whole", "kept", "lost")]
    whole, kept, lost = (document(base, name, stage) for name in names)
    folder = base / f"first-{stage}"
    ranks.require_ok(ranks.run_ranks(2, [whole], folder), folder)
    for config in (kept, lost):
        first = ranks.start_ranks(2, [config], base / config["run"]["name"], {"DIST_FT_FAILPOINT": "train.step:11@1"})
        assert -9 in ranks.wait_for_death(first)
    there = next((base / "node").glob(f"{names[2]}-*"))
    mine = list(there.glob("*/rank-00001-*"))
    assert mine
    for path in mine:
        path.unlink()
    again = base / f"again-{stage}"
    ranks.require_ok(ranks.run_ranks(2, [kept, lost], again), again)
    said = (again / "rank-0.log").read_text()
    assert "going on from step 9" in said or "going on from step 10" in said
    assert "on the nodes is passed over" in said and "going on from step 6" in said
    for config in (kept, lost):
        run = base / "runs" / config["run"]["name"]
        assert history.losses(run) == history.losses(base / "runs" / names[0])
        history.require_exactly_once(run, config)
    shutil.rmtree(base / "node")
