"""Minimum risk training: samples depend on seed, step, lane and row only; resuming is exact."""

from __future__ import annotations

from uuid import uuid4

import history
import pytest
import tiny
import tiny_tasks
from resolved import resolve

from dist_ft.config.load import load_config
from dist_ft.core.errors import ConfigError
from dist_ft.core.world import Collectives, World
from dist_ft.runtime import local
from dist_ft.runtime.bootstrap import build_model
from dist_ft.runtime.bootstrap.build_data import build_loaders
from dist_ft.storage.filesystem import Store
from dist_ft.training.minimum_risk import MinimumRisk

RISK = {
    "objective": "minimum_risk",
    "risk": {"candidates": 2, "max_new_tokens": 6, "metric": "token_error_rate", "alpha": 0.1},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_tasks.base(tiny.base(tmp_path_factory.mktemp("risk"), samples=40))


def document(base, task: str, name: str, steps: int, **fields):
    settings = (
        tiny.config(base, name, task=RISK, data={"pack": False}, **fields)
        if task == "causal_lm"
        else tiny_tasks.config(base, task, name, task=dict(RISK), **fields)
    )
    settings["schedule"] = {"name": "constant", "steps": steps}
    return settings


@pytest.mark.parametrize("task", ["causal_lm", "seq2seq"])
def test_resumed_run_has_the_losses_of_an_uninterrupted_one(base, task):
    settings = document(base, task, "x", 6)
    for name, steps in (("whole", 6), ("cut", 4), ("cut", 6)):
        settings["run"]["name"], settings["schedule"]["steps"] = f"{task[:3]}-{name}", steps
        local.run(load_config(settings))
    runs = [base / "runs" / f"{task[:3]}-{name}" for name in ("whole", "cut")]
    assert history.losses(runs[0]) == history.losses(runs[1]) and len(history.losses(runs[0])) == 6


def test_samples_of_a_lane_do_not_depend_on_other_lanes(base):
    config = load_config(document(base, "causal_lm", "x", 2))
    store = Store(f"memory://{uuid4().hex}")
    run = resolve(config, store)
    data = build_loaders(run, store, World(), Collectives())
    built = build_model.build_engine(run, World(), resumed=False)
    module, engine = built.module, built.engine
    risk, batches = (
        MinimumRisk.from_config(config, run.tokenizer),
        data.training.batches(0, range(5)),
    )

    def drawn(lanes, step=0):
        batches_with_risks, count = risk.prepare(
            [batches[lane] for lane in lanes], step, engine, Collectives(), lambda: None
        )
        assert count == sum(len(batches[lane].segments) for lane in lanes)
        return [(one.input_ids.tolist(), one.risks.tolist()) for one in batches_with_risks]

    every = drawn(range(5))
    assert [drawn([lane])[0] for lane in range(5)] == every
    assert drawn(range(5), step=1) != every
    assert all(risks[0] == 0 for _, risks in every) and any(max(risks) > 0.5 for _, risks in every)
    assert module.training, "dropout is on again"
    data.close()


def test_prompt_that_leaves_no_room_is_refused_in_one_line(base):
    settings = document(base, "causal_lm", "long", 2)
    settings["task"] = {**RISK, "risk": {"max_new_tokens": 60}}
    with pytest.raises(
        ConfigError,
        match=r"max_new_tokens=60: the model has 64 positions and the longest prompt \d+ tokens\. ",
    ):
        local.run(load_config(settings))
