"""Training by prompts under each engine: one answer, exact resume, each row scored once in any world."""

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
from dist_ft.config.task_facts import task_class
from dist_ft.runtime import local
from dist_ft.storage.filesystem import Store

pytestmark = pytest.mark.slow
SHARDED = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
WORDS = {"animal": " fox", "drink": " tea and news", "food": " bread", "place": " distant towns"}
METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"tuning": {"method": "lora", "lora": {"rank": 4}}},
    "partial": {"tuning": {"method": "partial", "last_layers": 1}},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prompted")
    tiny.make_model(folder / "model")
    return folder


def document_of(base: Path, method: str, name: str, **fields: Any) -> dict[str, Any]:
    document = tiny_tasks.config(
        base,
        "sequence_classification",
        name,
        model={"path": str(base / "model")},
        prompting={
            "method": "likelihood",
            "templates": ["say {text} :"],
            "verbalizers": WORDS,
            "calibrate": method == "full",
            "shots": 1,
            "shots_by": "all",
            "seed": 7,
        },
        batch={"global_batch": 10, "micro_batch": 2, "sequence_length": 64},
        **METHODS[method],
        **fields,
    )
    document["run"]["name"] = f"prompted-{method}-{name}"
    return document


def evaluations(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in Store(str(run)).read("metrics.jsonl").splitlines()]
    return [
        {k: v for k, v in line.items() if k != "time"}
        for line in lines
        if line["kind"] == "evaluation"
    ]


@pytest.mark.parametrize("method", METHODS)
def test_promises_2_and_7(base: Path, method: str) -> None:
    document = document_of(base, method, "plain")
    local.run(load_config(document))
    plain = base / "runs" / document["run"]["name"]
    losses = history.losses(plain)
    assert sum(losses[-4:]) < sum(losses[:4])
    assert set(task_class("sequence_classification").metrics) <= evaluations(plain)[-1].keys()
    documents = [
        document_of(base, method, f"z{stage}", workers=2, stage=stage) for stage in (0, 2, 3)
    ]
    documents[2]["zero"]["deepspeed"] = SHARDED
    folder = base / f"ranks-{method}"
    ranks.require_ok(ranks.run_ranks(2, documents, folder), folder)
    for own in documents:
        run = base / "runs" / own["run"]["name"]
        assert history.losses(run) == pytest.approx(losses, abs=1e-5), own["run"]["name"]
        history.require_exactly_once(run, own)
        assert evaluations(run)[0] == pytest.approx(evaluations(plain)[0], abs=1e-5)
        assert evaluations(run)[-1] == pytest.approx(evaluations(plain)[-1], abs=2e-2)
    killed = document_of(base, method, "killed", workers=2, stage=3)
    killed["zero"]["deepspeed"] = SHARDED
    assert ranks.run_ranks(
        2, [killed], base / f"k-{method}", env={"DIST_FT_FAILPOINT": "train.step:11"}
    ) == [-9, -9]
    ranks.require_ok(ranks.run_ranks(2, [killed], base / f"k-{method}"), base / f"k-{method}")
    assert history.losses(base / "runs" / killed["run"]["name"]) == history.losses(
        base / "runs" / documents[2]["run"]["name"]
    )
