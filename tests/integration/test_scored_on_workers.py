"""`evaluate` on two workers that share the weights under ZeRO-3 tells what one process tells."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_tasks

from dist_ft.config.load import load_config
from dist_ft.inference.evaluate import evaluate_models

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_two_workers_predict_the_same_as_one_process(tmp_path: Path) -> None:
    base = tiny_tasks.base(tmp_path)
    told = []
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
        told.append(evaluate_models(made, [made.model.path], random_head=True)[made.model.path])
    assert {name for name, value in told[0].items() if isinstance(value, float)} >= {
        "loss",
        "accuracy",
    }
    for name, value in told[0].items():
        if isinstance(value, float):
            assert told[1][name] == pytest.approx(value, abs=1e-5), name
    assert told[0]["by_tag"] == told[1]["by_tag"]
