"""Minimum risk training: one answer in every engine, exact resume, and a risk that falls."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import history
import pytest
import ranks
import tiny
import tiny_tasks

from dist_ft.config.load import load_config
from dist_ft.runtime import local
from dist_ft.storage.filesystem import Store

pytestmark = pytest.mark.slow
RISK = {
    "objective": "minimum_risk",
    "risk": {
        "metric": "chrf",
        "candidates": 3,
        "max_new_tokens": 8,
        "alpha": 0.05,
        "likelihood_weight": 0.02,
    },
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tasks.base(tiny.base(tmp_path_factory.mktemp("risk"), samples=40))


@pytest.fixture(scope="module", params=["causal_lm", "seq2seq"])
def task(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def document_of(base: Path, task: str, name: str, **fields: Any) -> dict[str, Any]:
    if task == "causal_lm":
        document = tiny.config(base, name, task=RISK, data={"pack": False}, **fields)
    else:
        document = tiny_tasks.config(base, task, name, task=dict(RISK), **fields)
    document["run"]["name"] = f"{task.replace('_', '-')}-{name}"
    document["schedule"] = {"name": "constant", "steps": 14}
    if fields.get("stage") == 3:
        document["zero"]["deepspeed"] = {
            "zero_optimization": {"stage3_param_persistence_threshold": 0}
        }
    return document


@pytest.fixture(scope="module")
def plain(base: Path, task: str) -> list[float]:
    local.run(load_config(document_of(base, task, "plain")))
    return history.losses(base / "runs" / f"{task.replace('_', '-')}-plain")


def test_promise_7_every_engine_matches_the_plain_losses(
    base: Path, task: str, plain: list[float]
) -> None:
    documents = [
        document_of(base, task, f"z{stage}", workers=2, stage=stage) for stage in (0, 2, 3)
    ]
    folder = base / f"ranks-{task}"
    ranks.require_ok(ranks.run_ranks(2, documents, folder), folder)
    for document in documents:
        run = base / "runs" / document["run"]["name"]
        assert history.losses(run) == pytest.approx(plain, abs=1e-5), document["run"]["name"]
        history.require_exactly_once(run, document)


@pytest.mark.parametrize("stage", [2, 3])
def test_promise_2_a_killed_run_resumes_bit_exact(
    base: Path, task: str, plain: list[float], stage: int
) -> None:
    document, folder = (
        document_of(base, task, f"killed-{stage}", workers=2, stage=stage),
        base / f"k-{task}-{stage}",
    )
    assert ranks.run_ranks(2, [document], folder, env={"DIST_FT_FAILPOINT": "train.step:11"}) == [
        -9,
        -9,
    ]
    ranks.require_ok(ranks.run_ranks(2, [document], folder), folder)
    unbroken = base / "runs" / f"{task.replace('_', '-')}-z{stage}"
    assert history.losses(base / "runs" / document["run"]["name"]) == history.losses(unbroken)


def test_held_out_generations_improve(base: Path) -> None:
    """Every target is one of a few words: chrF of generations rises without the likelihood of references."""
    folder = base / "words"
    folder.mkdir()
    rows = [{"source": word, "target": "the fox"} for word in tiny.WORDS]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    document = tiny_tasks.config(base, "seq2seq", "better", optimizer={"learning_rate": 1e-2})
    document["model"]["dropout"] = 0.0
    document["task"].update(
        {**RISK, "risk": {**RISK["risk"], "candidates": 8, "alpha": 0.2, "likelihood_weight": 0.0}}
    )
    document["data"]["train"] = str(folder / "rows.jsonl")
    document["schedule"] = {"name": "constant", "steps": 60}
    document["evaluation"] = {
        "data": str(folder / "rows.jsonl"),
        "decoding": {"max_new_tokens": 8},
        "text_metrics": "chrf",
    }
    local.run(load_config(document))
    run = Store(str(base / "runs/seq2seq-better"))
    lines = [json.loads(line) for line in run.read("metrics.jsonl").splitlines()]
    chrf = [line["chrf"] for line in lines if line["kind"] == "evaluation"]
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
    assert chrf[-1] > chrf[0] + 20
