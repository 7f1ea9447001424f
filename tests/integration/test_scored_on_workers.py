"""`evaluate` on two workers with sharded weights (ZeRO-3) equals one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_tasks

from dist_ft.config.load import load_config
from dist_ft.inference.evaluate import evaluate_models

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_two_workers_predict_the_same_as_one_process(tmp_path: Path) -> None:
    base = tiny_tasks.base(tmp_path)
    results = []
    for workers in (0, 2):
        made = load_config(
            tiny_tasks.config(
                base,
                "token_classification",
                "scored",
                workers=workers,
                stage=3,
                cluster={"workers": workers, "standby": False},
            )
        )
        results.append(evaluate_models(made, [made.model.path], random_head=True)[made.model.path])
    assert {name for name, value in results[0].items() if isinstance(value, float)} >= {
        "loss",
        "accuracy",
    }
    for name, value in results[0].items():
        if isinstance(value, float):
            assert results[1][name] == pytest.approx(value, abs=1e-5), name
    assert results[0]["by_tag"] == results[1]["by_tag"]
