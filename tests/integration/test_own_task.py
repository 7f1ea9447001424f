"""A user's own task, named by its import path, through every command; it is the docs' example."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import history
import pytest
import tiny_tasks
import yaml

EXAMPLES = Path(__file__).resolve().parents[2] / "docs" / "examples"
NAME = "pairwise_ranking:PairwiseRanking"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny encoder, and pairs of texts of which the one with tea is chosen."""
    base = tmp_path_factory.mktemp("own-task")
    tiny_tasks.make_encoder(base / "bert")
    rng = random.Random(3)
    for name, count in (("train", 96), ("held", 24)):
        rows = []
        for _ in range(count):
            words = rng.choices(tiny_tasks.PLAIN, k=rng.randint(2, 9))
            with_tea = [*words[:1], "tea", "tea", *words[1:]]
            rows.append({"chosen": " ".join(with_tea), "rejected": " ".join(words)})
        (base / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return base


def write_config(base: Path, name: str, workers: int = 0) -> Path:
    document: dict[str, Any] = {
        "run": {"name": name, "storage": str(base / "runs"), "seed": 5},
        "model": {"path": str(base / "bert"), "dtype": "float32"},
        "task": {"name": NAME},
        "data": {"train": str(base / "train.jsonl"), "overlong": "truncate"},
        "batch": {"global_batch": 12, "micro_batch": 3, "sequence_length": 48},
        "optimizer": {"name": "adamw", "learning_rate": 5e-3},
        "schedule": {"epochs": 3},
        "evaluation": {"data": str(base / "held.jsonl"), "every_steps": 8},
        "checkpoint": {"every_steps": 4},
        "cluster": {"workers": workers},
    }
    path = base / f"{name}.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def dist_ft(*args: str | Path, allowed: bool = True, **env: str) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": os.pathsep.join([str(EXAMPLES), *filter(None, sys.path)]),
        **env,
    }
    environment.pop("RAY_ADDRESS", None)
    options = ["--task", NAME] if allowed else []
    return subprocess.Popen(
        [sys.executable, "-m", "dist_ft.cli", *options, *map(str, args)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(*args: str | Path, code: int = 0, **options: Any) -> str:
    process = dist_ft(*args, **options)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == code, output[-3000:]
    return output


def last_evaluation(base: Path, name: str) -> dict[str, Any]:
    lines = (base / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["kind"] == "evaluation"][-1]


@pytest.fixture(scope="module")
def trained(base: Path) -> Path:
    """The run of one process; its config names the task, so no option is needed."""
    run("train", write_config(base, "one"), allowed=False)
    return base / "runs" / "one"


def test_the_task_is_trained_and_evaluated(base: Path, trained: Path) -> None:
    losses = history.losses(trained)
    assert len(losses) == 24 and sum(losses[-4:]) < 0.5 * sum(losses[:4])
    assert last_evaluation(base, "one")["accuracy"] > 0.9


def test_a_killed_run_of_the_task_resumes_bit_exact(base: Path, trained: Path) -> None:
    config = write_config(base, "killed")
    died = dist_ft("train", config, DIST_FT_FAILPOINT="train.step:11")
    died.communicate(timeout=300)
    assert died.returncode == -signal.SIGKILL
    run("train", config)
    assert history.losses(base / "runs" / "killed") == history.losses(trained)


def test_the_task_works_with_evaluate_predict_report_and_export(
    base: Path, trained: Path, tmp_path: Path
) -> None:
    out = tmp_path / "model"
    run("export", trained, "--out", out)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "the fox tea tea runs"}\n{"text": "the fox runs"}\n')
    run("predict", out, rows, "--out", tmp_path / "found.jsonl")
    lines = (tmp_path / "found.jsonl").read_text().splitlines()
    scores = [json.loads(line)["prediction"]["score"] for line in lines]
    assert scores[0] > scores[1]

    found = json.loads(run("evaluate", write_config(base, "one"), "--model", out, "--json"))
    expected = last_evaluation(base, "one")
    (model_scores,) = found.values()
    assert model_scores["accuracy"] == expected["accuracy"]
    assert model_scores["loss"] == pytest.approx(expected["loss"], abs=1e-5)

    run("runs", "report", trained, "--out", tmp_path / "report")
    assert "accuracy" in (tmp_path / "report" / "report.html").read_text()


def test_a_folder_alone_does_not_make_the_code_run(trained: Path, tmp_path: Path) -> None:
    output = run("export", trained, "--out", tmp_path / "model", code=2, allowed=False)
    assert f"task.name={NAME}: a folder names this class" in output
    assert f"dist-ft --task {NAME}" in output and "Traceback" not in output


@pytest.mark.ray
def test_two_zero_ranks_on_ray_give_the_same_losses_and_resume(base: Path, trained: Path) -> None:
    config = write_config(base, "two", workers=2)
    # A worker is killed once and replaced; later the run is stopped, and the command repeated.
    died = base / "died-once"
    failpoint = {"DIST_FT_FAILPOINT": "train.step:3@1", "DIST_FT_FAILPOINT_ONCE": str(died)}
    process = dist_ft("train", config, **failpoint)
    metrics = base / "runs" / "two" / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not metrics.exists() or len(history.losses(metrics.parent)) < 6:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode != 0 and died.exists()
    run("train", config)
    assert history.losses(metrics.parent) == pytest.approx(history.losses(trained), abs=1e-5)
    assert last_evaluation(base, "two")["accuracy"] == last_evaluation(base, "one")["accuracy"]
