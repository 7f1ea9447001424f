"""A run that reaches its limit saves, says how to resume, and continues with a higher one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import history
import pytest
import tiny

from dist_ft.config.load import load_config
from dist_ft.core.errors import LimitReached
from dist_ft.runtime import local
from dist_ft.training.result import Result


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.base(tmp_path_factory.mktemp("limits"), 40)


def run(base: Path, name: str, **run_fields: Any) -> Result:
    document = tiny.config(
        base,
        name,
        schedule={"epochs": None, "steps": 6},
        cluster={"cost_per_hour": 30},
        checkpoint={"every_steps": 0},
        run=run_fields,
    )
    return local.run(load_config(document))


def test_limits_stop_with_a_checkpoint_over_all_attempts(base: Path) -> None:
    unbroken = run(base, "unbroken")
    with pytest.raises(LimitReached) as caught:
        run(base, "limited", max_hours=1e-7)
    error, folder = caught.value, base / "runs/limited"
    assert error.exit_code == 3 and not error.retryable
    assert str(error).startswith("run.max_hours=1e-07: reached, with 0.00 hours of 1 attempt; ")
    assert f"stopped at step 1 of 6; saved as {folder}/checkpoints/step-000000001-" in str(error)
    assert str(error).endswith("raise run.max_hours, then run the same command to resume")
    assert "ended" in json.loads((folder / "time/000001.json").read_text())

    # Not reset by a restart: the next start finds it used up, and takes no attempt number.
    with pytest.raises(LimitReached, match="no step was trained now"):
        run(base, "limited", max_cost=1e-5)
    assert len(list((folder / "attempts").glob("*.json"))) == 1

    result = run(base, "limited", max_hours=5, max_cost=5)
    assert (result.step, result.loss) == (6, unbroken.loss)
    assert history.losses(folder) == history.losses(base / "runs/unbroken")


def test_last_step_is_complete_whatever_the_limit(base: Path) -> None:
    document = tiny.config(
        base,
        "short",
        schedule={"epochs": None, "steps": 1, "warmup_steps": 0},
        run={"max_hours": 1e-7},
    )
    assert local.run(load_config(document)).step == 1
