"""Optuna and ASHA receive the results of finished trials; no Ray is started."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from dist_ft.config.search import Search, SearchSection
from dist_ft.workflows import ray_tune
from dist_ft.workflows.trial import (
    Trial,
)

DOCUMENT = {
    "run": {"storage": "runs"},
    "model": {"path": "m"},
    "data": {"train": "a"},
    "batch": {"global_batch": 4, "sequence_length": 8},
    "schedule": {"steps": 90},
    "evaluation": {"data": "b", "every_steps": 3},
}
RATE, FREEZE = "optimizer.learning_rate", "tuning.frozen"
SPACE = {
    RATE: {"low": 1e-5, "high": 1e-1, "log": True},
    FREEZE: [[], ["*.bias"]],
    "schedule.warmup_steps": {"low": 0, "high": 3},
}


def section(**fields) -> SearchSection:
    return SearchSection.model_validate(
        {"name": "x", "search": "optuna", "trials": 30, "space": SPACE, **fields}
    )


def values(rate: float, frozen: list[str], warmup: int) -> dict:
    return {RATE: rate, FREEZE: frozen, "schedule.warmup_steps": warmup}


def suggestions(searcher, count: int) -> list[dict]:
    return [
        found["trial"]
        for found in (searcher.suggest(f"id-{number}") for number in range(count))
        if found
    ]


def test_optuna_suggests_values_of_the_space_and_every_number_once():
    found = suggestions(ray_tune._optuna_searcher(section(), "min", [], []), 40)
    assert [one["number"] for one in found] == list(range(30)), "and then nothing"
    for one in found:
        assert 1e-5 <= one["values"][RATE] <= 1e-1 and one["values"][FREEZE] in ([], ["*.bias"])
        assert one["values"]["schedule.warmup_steps"] in (0, 1, 2, 3)
    assert {len(one["values"][FREEZE]) for one in found} == {0, 1}


def test_unfinished_trials_come_first_with_their_values_and_finished_ones_not_again():
    finished = [
        Trial(0, values(1e-3, [], 1), "done", ((3, 0.5),)),
        Trial(2, values(1e-2, ["*.bias"], 0), "stopped"),
    ]
    unfinished = [Trial(1, values(3e-4, ["*.bias"], 2))]
    found = suggestions(
        ray_tune._optuna_searcher(section(trials=6), "min", finished, unfinished), 10
    )
    assert found[0] == {"number": 1, "values": values(pytest.approx(3e-4), ["*.bias"], 2)}
    assert [one["number"] for one in found] == [1, 3, 4, 5]
    assert values(1e-3, [], 1) not in [one["values"] for one in found]


@pytest.mark.parametrize("mode", ["min", "max"])
def test_finished_trials_guide_optuna(mode):
    """In 20 finished trials small rates were good."""
    sign = 1 if mode == "min" else -1
    finished = [
        Trial(n, values(10 ** (-5 + 4 * n / 19), [], 1), "done", ((3, sign * n / 19),))
        for n in range(20)
    ]
    found = suggestions(ray_tune._optuna_searcher(section(trials=30), mode, finished, []), 10)
    assert sorted(one["values"][RATE] for one in found)[5] < 1e-3


def test_asha_knows_the_rungs_of_finished_trials():
    search = Search(section(asha={"grace_steps": 6, "reduction": 2}), DOCUMENT, ())
    base = search.config({})
    finished = [
        Trial(n, {}, "done", ((3, 0.9), (6, value), (12, value - 0.1)))
        for n, value in enumerate((0.2, 0.3, 0.4))
    ]

    def decision(trials: list[Trial], value: float) -> str:
        asha, trial = (
            ray_tune._scheduler(search.section, base, "min", trials),
            SimpleNamespace(trial_id="new"),
        )
        asha.on_trial_add(None, trial)
        assert asha.on_trial_result(None, trial, {"step": 3, "value": value}) == "CONTINUE", (
            "before the first rung"
        )
        return asha.on_trial_result(None, trial, {"step": 6, "value": value})

    assert (decision(finished, 0.9), decision(finished, 0.1), decision([], 0.9)) == (
        "STOP",
        "CONTINUE",
        "CONTINUE",
    )


def test_without_asha_trials_are_not_stopped_early():
    search = Search(section(), DOCUMENT, ())
    assert ray_tune._scheduler(search.section, search.config({}), "min", []) is None
