"""The points of a search, and errors in its file."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import yaml

from dist_ft.config.search import Search, load_search
from dist_ft.core.errors import ConfigError

BASE = {
    "run": {"name": "x", "storage": "runs"},
    "model": {"path": "m"},
    "data": {"train": "a.jsonl"},
    "batch": {"global_batch": 4, "micro_batch": 2, "sequence_length": 8},
    "schedule": {"steps": 9},
    "evaluation": {"data": "held.jsonl", "every_steps": 3},
}


def load(
    folder: Path, base: dict | None = None, overrides: tuple[str, ...] = (), **fields
) -> Search:
    (folder / "base.yaml").write_text(yaml.safe_dump(base or BASE))
    (folder / "search.yaml").write_text(yaml.safe_dump({"name": "find", **fields}))
    return load_search(str(folder / "base.yaml"), str(folder / "search.yaml"), overrides)


def problems(folder: Path, base: dict | None = None, **fields) -> str:
    with pytest.raises(ConfigError) as caught:
        load(folder, base, **fields)
    return "\n".join(caught.value.problems)


def test_a_grid_has_each_combination_once(tmp_path):
    search = load(
        tmp_path,
        search="grid",
        space={"optimizer.learning_rate": [1e-3, 1e-4], "schedule.steps": [1, 2, 3]},
    )
    assert search.section.num_trials == 6
    points = [search.section.point(number) for number in range(6)]
    assert sorted((p["optimizer.learning_rate"], p["schedule.steps"]) for p in points) == [
        (rate, steps) for rate in (1e-4, 1e-3) for steps in (1, 2, 3)
    ]
    assert (
        load(tmp_path, search="grid", trials=4, space={"schedule.steps": [1, 2]}).section.num_trials
        == 2
    )


def test_random_points_follow_from_seed_and_number(tmp_path):
    space = {
        "optimizer.learning_rate": {"low": 1e-5, "high": 1e-1, "log": True},
        "schedule.steps": {"low": 2, "high": 5},
        "optimizer.name": ["adamw", "sgd"],
    }
    one, same, other = (
        load(tmp_path, trials=200, seed=seed, space=space).section for seed in (1, 1, 2)
    )
    points = [one.point(number) for number in range(200)]
    assert points == [same.point(number) for number in range(200)]
    assert points != [other.point(number) for number in range(200)]
    rates = [point["optimizer.learning_rate"] for point in points]
    assert all(1e-5 <= rate <= 1e-1 for rate in rates)
    assert sum(rate < 1e-3 for rate in rates) == pytest.approx(100, abs=25), (
        "uniform on a logarithmic scale"
    )
    counts = {
        steps: sum(point["schedule.steps"] == steps for point in points) for steps in (2, 3, 4, 5)
    }
    assert sum(counts.values()) == 200 and min(counts.values()) > 25, (
        "both ends are as likely as the values between"
    )
    assert math.isclose(sum(point["optimizer.name"] == "sgd" for point in points), 100, abs_tol=30)


def test_the_values_of_a_trial_take_precedence(tmp_path):
    search = load(
        tmp_path,
        overrides=("optimizer.learning_rate=1e-3", "run.seed=5"),
        space={"optimizer.learning_rate": [2e-3]},
    )
    run = search.config({"optimizer.learning_rate": 2e-3}, 7)
    assert (run.run.name, run.run.seed, run.optimizer.learning_rate) == ("find-t7", 5, 2e-3)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"space": {}}, "space: "),
        (
            {"space": {"schedule.steps": {"low": 3, "high": 3}}},
            "space.schedule.steps: low must be below high",
        ),
        (
            {"space": {"schedule.steps": {"low": 3}}},
            "space.schedule.steps: either values, or low and high, are needed",
        ),
        (
            {"space": {"optimizer.beta1": {"low": 0, "high": 0.5, "log": True}}},
            "log needs a low above 0",
        ),
        ({"space": {"schedule.steps": [1]}, "trails": 3}, "trails: "),
        (
            {"space": {"schedule.steps": {"low": 1, "high": 3}}, "search": "grid"},
            "is a range, and a grid needs values",
        ),
        (
            {"space": {"schedule.step": [1]}},
            "schedule.step: no such field. Did you mean schedule.steps?",
        ),
        (
            {"space": {"batch.global_batch": [3]}, "search": "grid"},
            "batch.global_batch=3: not a multiple",
        ),
        (
            {"space": {"batch.global_batch": {"low": 4, "high": 5}}, "search": "optuna"},
            "batch.global_batch=5: not a mult",
        ),
    ],
)
def test_an_invalid_file_is_refused(tmp_path, fields, expected):
    assert expected in problems(tmp_path, **fields)


@pytest.mark.parametrize(
    ("changes", "more", "expected"),
    [
        (
            {"cluster": {"workers": 2}, "batch": {"global_batch": 4, "sequence_length": 8}},
            {},
            "cluster.workers=2: a trial is",
        ),
        ({"evaluation": {}}, {}, "evaluation.data: trials are compared"),
        (
            {"evaluation": {"data": "held.jsonl"}},
            {"asha": {"grace_steps": 2}},
            "asha: a trial can only be stopped after",
        ),
    ],
)
def test_a_run_that_cannot_be_a_trial_is_refused(tmp_path, changes, more, expected):
    assert expected in problems(
        tmp_path, {**BASE, **changes}, space={"optimizer.learning_rate": [1e-3]}, **more
    )
