"""Real stages: a model is trained on one data set after the other, killed in between, and resumed."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import history
import pytest
import ranks
import tiny
import tiny_tasks
import yaml
from safetensors.torch import load_file

from dist_ft import api
from dist_ft.checkpoint import initial_weights
from dist_ft.config.load import load_config
from dist_ft.config.stages import load_stages
from dist_ft.core.errors import ConfigError, ModelError
from dist_ft.runtime import local
from dist_ft.storage.filesystem import Store

KIND = "sequence_classification"


def rows(path: Path, labels: set[str], count: int, seed: int) -> str:
    rng, found = random.Random(seed), []
    while len(found) < count:
        row = tiny_tasks.row(KIND, rng)
        if row["label"] in labels:
            found.append(row)
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return str(path)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stages")
    tiny_tasks.make_encoder(folder / "bert")
    for name, labels in (("one", {"animal", "drink"}), ("two", {"food"})):
        rows(folder / f"{name}.jsonl", labels, 60, 1)
        rows(folder / f"{name}-held.jsonl", labels, 20, 2)
    return folder


def document(
    base: Path, name: str, storage: str, train: str = "one", **changes: Any
) -> dict[str, Any]:
    made = tiny.config(
        base, name, **{"model": {"path": str(base / "bert")}, "task": {"name": KIND}, **changes}
    )
    made["run"]["storage"] = str(base / storage)
    made["data"] |= {"format": "auto", "train": str(base / f"{train}.jsonl"), "block_mib": 0.004}
    made["batch"] = {"global_batch": 10, "micro_batch": 2, "sequence_length": 40}
    made["evaluation"] = {"data": str(base / f"{train}-held.jsonl")}
    return made


def write(base: Path, storage: str, **second: Any) -> str:
    shared = document(base, "x", storage)
    del shared["data"]["train"], shared["evaluation"]
    (base / f"{storage}.yaml").write_text(yaml.safe_dump(shared))
    file = base / f"{storage}-stages.yaml"
    file.write_text(
        yaml.safe_dump(
            {
                "name": "seq",
                "config": f"{storage}.yaml",
                "stages": [
                    {
                        "name": name,
                        "overrides": {
                            "data.train": str(base / f"{name}.jsonl"),
                            "evaluation.data": str(base / f"{name}-held.jsonl"),
                        },
                        **more,
                    }
                    for name, more in (("one", {}), ("two", {"replay": 0.25, **second}))
                ],
            }
        )
    )
    return str(file)


def start(file: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dist_ft.cli", "stages", file],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
    )


@pytest.fixture(scope="module")
def unbroken(base: Path) -> Path:
    """Stages that were never stopped, and what they left."""
    api.stages(write(base, "whole"), report_line=lambda text: None)
    return base / "whole"


def matrix(storage: Path) -> dict[str, Any]:
    return json.loads((storage / "seq" / "matrix.json").read_text())


def test_a_stage_starts_from_the_weights_of_the_stage_before_and_adds_labels(
    base: Path, unbroken: Path
) -> None:
    second = json.loads((unbroken / "seq-two" / "model" / "config.json").read_text())
    assert list(second["id2label"].values()) == ["animal", "drink", "food"]
    began = json.loads((unbroken / "seq-two" / initial_weights.INITIAL_CHECKPOINT).read_text())
    step = max(
        int(folder.name.split("-")[1])
        for folder in (unbroken / "seq-one" / "checkpoints").iterdir()
    )
    assert began == {"run": str(unbroken / "seq-one"), "step": step}
    found = matrix(unbroken)
    assert found["matrix"][0][1] is None, "the head of the first has not the label of the second"
    assert all(value is not None for value in found["matrix"][1])
    assert found["matrix"][0][0] >= 0.7, "better than chance, which is 0.5"
    assert found["after"][1]["backward_transfer"] == pytest.approx(
        found["matrix"][1][0] - found["matrix"][0][0]
    )
    assert {"matrix.md", "matrix.png", "stages.json", "scores"} <= set(
        Store(str(unbroken / "seq")).list()
    )
    lines = [
        json.loads(line)
        for line in Store(str(unbroken / "seq-two")).read("metrics.jsonl").splitlines()
    ]
    drawn = [
        sum(line.get(f"sequences/{name}", 0) for line in lines)
        for name in ("source-0", "replay-one-0")
    ]
    assert drawn == [120, 40], (
        "two epochs of 60, and a quarter of all sequences is the first stage's"
    )


def test_stages_killed_in_the_second_stage_resume_there_with_the_same_result(
    base: Path, unbroken: Path
) -> None:
    file = write(base, "killed")
    first_steps = len(history.losses(unbroken / "seq-one"))
    assert start(file, DIST_FT_FAILPOINT=f"train.step:{first_steps + 7}").returncode == -9
    assert start(file, DIST_FT_FAILPOINT="stages.trained").returncode == -9, (
        "just before the stage is recorded as complete"
    )
    again = start(file)
    assert again.returncode == 0, again.stderr
    assert "stage one is complete" in again.stdout
    attempts = [
        len(Store(str(base / "killed" / f"seq-{name}")).list("attempts")) for name in ("one", "two")
    ]
    assert attempts == [1, 2], "a completed stage is not run again"
    for name in ("one", "two"):
        assert history.losses(base / "killed" / f"seq-{name}") == history.losses(
            unbroken / f"seq-{name}"
        )
    assert matrix(base / "killed")["matrix"] == matrix(unbroken)["matrix"]


def test_a_completed_stage_cannot_change(base: Path, unbroken: Path) -> None:
    file = Path(write(base, "whole"))
    whole = yaml.safe_load(file.read_text())
    changed = yaml.safe_load(file.read_text())
    changed["stages"][0]["overrides"]["optimizer.learning_rate"] = 1e-4
    turned = {**whole, "stages": whole["stages"][::-1]}
    turned["stages"][0].pop("replay")
    other = base / "changed.yaml"
    for content, said in (
        (changed, "optimizer.learning_rate=0.0001: stage one was completed with 0.005"),
        (turned, "one, two were started in this order"),
    ):
        other.write_text(yaml.safe_dump(content))
        with pytest.raises(ConfigError, match=said) as caught:
            api.stages(str(other), report_line=lambda text: None)
        assert len(caught.value.problems) == 1
    said: list[str] = []
    api.stages(str(file), ["log.every_steps=5"], report_line=said.append)
    assert [text for text in said if "complete" in text] == [
        f"stage {name} is complete: {unbroken}/seq-{name}" for name in ("one", "two")
    ]


def test_a_run_starts_from_the_result_of_another_run(base: Path, unbroken: Path) -> None:
    """Its first evaluation is bit-equal to the other's last; it resumes when the other is gone."""
    started_run = document(
        base, "after", "whole", model={"path": str(unbroken / "seq-one")}, task={"name": KIND}
    )
    started_run["optimizer"]["learning_rate"] = 1e-12
    started_run["schedule"] = {"name": "constant", "steps": 2}
    local.run(load_config(started_run))
    step = json.loads((unbroken / "after" / initial_weights.INITIAL_CHECKPOINT).read_text())["step"]
    source = load_file(
        Path(
            initial_weights.export_to_cache(
                str(unbroken / "seq-one"), step, started_run["data"]["cache_dir"]
            )
        )
        / "model.safetensors"
    )
    api.export(str(unbroken / "after"), str(base / "after-out"))
    moved = load_file(base / "after-out" / "model.safetensors")
    assert all((moved[name] - value).abs().max() < 1e-8 for name, value in source.items())
    first = json.loads(Store(str(unbroken / "after")).read("metrics.jsonl").splitlines()[0])
    assert first["loss"] == pytest.approx(matrix(unbroken)["metrics"][0][0]["loss"], rel=1e-6)
    (unbroken / "seq-one").rename(base / "hidden")
    try:
        started_run["schedule"]["steps"] = 3
        assert api.check(load_config(started_run)) == []
        assert local.run(load_config(started_run)).step == 3
    finally:
        (base / "hidden").rename(unbroken / "seq-one")


def test_starting_from_a_folder_without_a_checkpoint_is_refused(base: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "run.yaml").write_text("{}")
    config = load_config(document(base, "y", "whole", model={"path": str(tmp_path / "empty")}))
    (line,) = [line for line in api.check(config) if "model.path" in line]
    assert "is a run without a checkpoint yet" in line
    with pytest.raises(ModelError, match="is a run without a checkpoint yet"):
        local.run(config)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_promise_7_two_ranks_grow_a_head_as_one_process_does(
    base: Path, unbroken: Path, stage: int
) -> None:
    config = load_stages(write(base, "whole")).stages[1].config
    made = json.loads(config.model_dump_json())
    made["run"]["name"], made["cluster"]["workers"], made["zero"]["stage"] = (
        f"ranks-{stage}",
        2,
        stage,
    )
    folder = base / f"ranks-{stage}"
    ranks.require_ok(ranks.run_ranks(2, [made], folder), folder)
    assert history.losses(unbroken / made["run"]["name"]) == pytest.approx(
        history.losses(unbroken / "seq-two"), abs=1e-5
    )


@pytest.mark.slow
@pytest.mark.ray
def test_stages_on_ray_workers(base: Path, unbroken: Path) -> None:
    api.stages(
        write(base, "ray"),
        ["cluster.workers=2", "zero.stage=2", "cluster.standby=false"],
        report_line=lambda text: None,
    )
    for name in ("one", "two"):
        assert history.losses(base / "ray" / f"seq-{name}") == pytest.approx(
            history.losses(unbroken / f"seq-{name}"), abs=1e-5
        )
