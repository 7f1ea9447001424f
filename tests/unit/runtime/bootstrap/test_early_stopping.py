"""A run that ends early: at which step, that it stays ended, and continues on request."""

from __future__ import annotations

import io
from uuid import uuid4

import pytest
import tiny

from dist_ft import api
from dist_ft.checkpoint import discovery
from dist_ft.config.load import load_config
from dist_ft.core.errors import CheckpointError, ConfigError
from dist_ft.runtime import local
from dist_ft.storage.filesystem import Store
from dist_ft.training.console import Console
from dist_ft.training.metrics_log import read_metrics
from dist_ft.training.run_context import RunContext


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.base(tmp_path_factory.mktemp("early"), 40)


def document(base, name, **changes):
    """A run whose learning rate is so high that it gets worse."""
    return tiny.config(
        base,
        name,
        schedule={"epochs": None, "steps": 40, "warmup_steps": 0},
        optimizer={"learning_rate": 0.5},
        checkpoint={"every_steps": 2, "keep_best": 1},
        evaluation={
            "data": str(base / "data" / "shard-0.jsonl"),
            "max_samples": 5,
            "every_steps": 2,
            "patience": 2,
            **changes,
        },
    )


def go(made):
    stream = io.StringIO()
    return local.run(load_config(made), RunContext(console=Console(stream))), stream.getvalue()


def steps(store):
    return [
        step
        for step, _ in sorted(
            (line["step"], line["loss"])
            for line in read_metrics(store)
            if line["kind"] == "evaluation"
        )
    ]


def test_run_ends_early_stays_ended_and_continues_with_more_patience(base):
    made = document(base, f"run-{uuid4().hex[:8]}")
    result, shown = go(made)
    store = Store(result.run_url)
    metrics_by_step = {
        line["step"]: line["loss"] for line in read_metrics(store) if line["kind"] == "evaluation"
    }
    best = min(metrics_by_step, key=lambda step: metrics_by_step[step])
    assert (
        result.step < 40
        and list(metrics_by_step)[-1] == result.step
        and f"early stopping at step {result.step}: loss has not improved on" in shown
    )
    assert list(metrics_by_step).index(result.step) - list(metrics_by_step).index(best) == 2
    assert result.evaluation_after == metrics_by_step[result.step]
    again, shown = go(made)
    assert (
        again.step == result.step
        and "where the run ended early; raise evaluation.patience to continue" in shown
    )
    if best:
        assert any(
            name.startswith(f"step-{best:09d}") for name in discovery.list_committed(store)
        ), "the best is kept"
    longer, _ = go({**made, "evaluation": {**made["evaluation"], "patience": 0}})
    assert longer.step == 40 and len(discovery.list_committed(store)) >= 2


def test_best_checkpoint_is_exported(base, tmp_path):
    made = document(base, f"run-{uuid4().hex[:8]}", patience=0, at_start=False)
    made["schedule"]["steps"] = 8
    result, _ = go(made)
    metrics_by_step = {
        line["step"]: line["loss"]
        for line in read_metrics(Store(result.run_url))
        if line["kind"] == "evaluation"
    }
    best = min(metrics_by_step, key=lambda step: metrics_by_step[step])
    api.export(result.run_url, str(tmp_path / "best"), best=True)
    api.export(result.run_url, str(tmp_path / "step"), step=best)
    assert (tmp_path / "best/model.safetensors").read_bytes() == (
        tmp_path / "step/model.safetensors"
    ).read_bytes()


def test_evaluation_by_epochs_stops_early(base):
    made = document(base, f"run-{uuid4().hex[:8]}", patience=0, every_steps=0, every_epochs=1)
    made["schedule"] = {"epochs": 2}
    made["checkpoint"] = {"keep_best": 1, "every_steps": 1}
    made["optimizer"] = {"learning_rate": 1e-3}
    result, _ = go(made)
    assert steps(Store(result.run_url)) == [0, result.step // 2, result.step]


def test_unknown_metric_is_reported(base):
    made = document(base, f"run-{uuid4().hex[:8]}")
    made["checkpoint"]["best_by"] = "f1"
    with pytest.raises(
        ConfigError,
        match=r"checkpoint\.best_by=f1: not a metric of evaluations of task\.name=causal_lm\.",
    ):
        go(made)


def test_best_without_evaluations_is_an_error(base, tmp_path):
    made = document(base, f"run-{uuid4().hex[:8]}", patience=0, every_steps=0, at_end=False)
    made["checkpoint"] = {"every_steps": 0}
    made["schedule"]["steps"] = 1
    result, _ = go(made)
    with pytest.raises(CheckpointError, match=r"--best: no checkpoint of .* was evaluated"):
        api.export(result.run_url, str(tmp_path / "x"), best=True)
