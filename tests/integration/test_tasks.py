"""Each task with its head, under each engine: one answer, exact resume, metrics that do not know of workers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import history
import pytest
import ranks
import tiny_tasks

from dist_ft import api
from dist_ft.config.load import load_config
from dist_ft.config.task_facts import task_class
from dist_ft.runtime import local
from dist_ft.storage.filesystem import Store

TASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "sequence_classification": ("accuracy", {}),
    "multi_label": ("f1_micro", {"task": {"focal_gamma": 1.0}}),
    "regression": ("pearson", {}),
    "token_classification": ("f1", {}),
    "question_answering": (
        "f1",
        {
            "task": {"stride": 2},
            "batch": {"sequence_length": 12, "global_batch": 10, "micro_batch": 2},
        },
    ),
    "seq2seq": ("accuracy", {}),
    "masked_lm": ("accuracy", {}),
    "embedding": ("mrr", {}),
    "lora": ("accuracy", {"tuning": {"method": "lora", "lora": {"rank": 4}}}),
}
SHARDED = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_tasks.base(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(
            name, marks=[] if name in ("sequence_classification", "seq2seq") else pytest.mark.slow
        )
        for name in TASKS
    ],
)
def task(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def document_of(base: Path, task: str, name: str, **fields: Any) -> dict[str, Any]:
    made = TASKS[task][1]
    document = tiny_tasks.config(
        base,
        "sequence_classification" if task == "lora" else task,
        name,
        **{key: dict(value) for key, value in made.items()},
        **fields,
    )
    document["run"]["name"] = f"{task.replace('_', '-')}-{name}"
    return document


def evaluation(run: Path, which: int) -> dict[str, Any]:
    lines = [json.loads(line) for line in Store(str(run)).read("metrics.jsonl").splitlines()]
    return [line for line in lines if line["kind"] == "evaluation"][which]


@pytest.fixture(scope="module")
def plain(base: Path, task: str) -> Path:
    """The run of the plain engine, whose loss falls."""
    document = document_of(base, task, "plain")
    local.run(load_config(document))
    run = base / "runs" / document["run"]["name"]
    losses = history.losses(run)
    assert sum(losses[-4:]) < sum(losses[:4])
    assert all(TASKS[task][0] in evaluation(run, which) for which in (0, -1))
    metrics = {
        name
        for name in evaluation(run, -1)
        if name not in ("step", "kind", "time", "loss", "num_target_tokens")
    }
    assert metrics == set(task_class(document["task"]["name"]).metrics), (
        "the allowed values of checkpoint.best_by"
    )
    return run


def test_promise_7_every_engine_matches_the_plain_losses_and_metrics(
    base: Path, task: str, plain: Path
) -> None:
    documents = [
        document_of(base, task, f"z{stage}", workers=2, stage=stage) for stage in (0, 2, 3)
    ]
    documents[2]["zero"]["deepspeed"] = SHARDED
    folder = base / f"ranks-{task}"
    ranks.require_ok(ranks.run_ranks(2, documents, folder), folder)
    for document in documents:
        run = base / "runs" / document["run"]["name"]
        assert history.losses(run) == pytest.approx(history.losses(plain), abs=1e-5), document[
            "run"
        ]["name"]
        history.require_exactly_once(run, document)
        for which in (0, -1):
            expected, found = evaluation(plain, which), evaluation(run, which)
            assert {k: v for k, v in found.items() if k != "time"} == pytest.approx(
                {k: v for k, v in expected.items() if k != "time"}, abs=2e-2 if which else 1e-5
            )


@pytest.mark.parametrize("stage", [2, 3])
def test_promise_2_a_killed_run_resumes_bit_exact(
    base: Path, task: str, plain: Path, stage: int
) -> None:
    document, folder = (
        document_of(base, task, f"killed-{stage}", workers=2, stage=stage),
        base / f"k-{task}-{stage}",
    )
    document["zero"]["deepspeed"] = SHARDED if stage == 3 else {}
    assert ranks.run_ranks(2, [document], folder, env={"DIST_FT_FAILPOINT": "train.step:11"}) == [
        -9,
        -9,
    ]
    ranks.require_ok(ranks.run_ranks(2, [document], folder), folder)
    unbroken = base / "runs" / f"{task.replace('_', '-')}-z{stage}"
    assert history.losses(base / "runs" / document["run"]["name"]) == history.losses(unbroken)


def test_the_export_is_a_plain_model_with_its_labels(
    base: Path, task: str, plain: Path, tmp_path: Path
) -> None:
    from transformers import AutoConfig

    api.export(str(plain), str(tmp_path / "out"))  # loaded again and compared
    config = AutoConfig.from_pretrained(tmp_path / "out")
    if task in ("sequence_classification", "multi_label", "lora"):
        assert list(config.id2label.values()) == tiny_tasks.LABELS
    if task == "token_classification":
        assert list(config.id2label.values()) == [
            "O",
            *(f"B-{label}" for label in tiny_tasks.LABELS),
        ]


def test_padding_stays_low(base: Path, task: str, plain: Path) -> None:
    from dist_ft.data.tools import preview

    with api._open_training_loader(load_config(document_of(base, task, "plain"))) as loader:
        assert preview.compute_statistics(loader).padding_share < 0.15


@pytest.mark.slow
def test_a_new_head_of_another_size_is_equal_in_every_engine(base: Path) -> None:
    """transformers passes over the old one by itself, but under ZeRO-3 raised on rank 0 alone."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = base / "seven"
    AutoModelForSequenceClassification.from_pretrained(base / "bert", num_labels=7).save_pretrained(
        folder
    )
    AutoTokenizer.from_pretrained(base / "bert").save_pretrained(folder)
    documents = [
        tiny_tasks.config(
            base,
            "sequence_classification",
            f"seven-{workers}-{stage}",
            workers=workers,
            stage=stage,
            task={"new_head": True},
        )
        for workers, stage in ((0, 0), (2, 2), (2, 3))
    ]
    for document in documents:
        document["model"]["path"] = str(folder)
    local.run(load_config(documents[0]))
    ranks.require_ok(
        ranks.run_ranks(2, documents[1:], base / "ranks-seven", timeout_s=120), base / "ranks-seven"
    )
    first, *others = [
        history.losses(base / "runs" / document["run"]["name"]) for document in documents
    ]
    for other in others:
        assert other == pytest.approx(first, abs=1e-5)
