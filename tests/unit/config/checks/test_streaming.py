"""What needs the index is named, each with what to set."""

from __future__ import annotations

import pytest
from unit.small import run_config

from dist_ft.config.checks.contradictions import contradictions
from dist_ft.config.checks.streaming import index_reasons

STREAMED = {"train": "a.jsonl", "overlong": "truncate", "bad_rows": "skip"}
STEPS = {"epochs": None, "steps": 10}


def reasons(data=None, schedule=None, **sections):
    config = run_config(
        "runs", data={**STREAMED, **(data or {})}, schedule=schedule or STEPS, **sections
    )
    return index_reasons(config)


def test_a_run_by_steps_streams():
    assert reasons() == []


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"schedule": {"epochs": 1, "steps": None}}, "schedule.epochs"),
        ({"data": {"shuffle": False}}, "data.shuffle=false"),
        ({"data": {"overlong": "error"}}, "data.overlong=error"),
        ({"data": {"bad_rows": "error"}}, "data.bad_rows=error"),
        ({"evaluation": {"data": "b.jsonl", "every_epochs": 1}}, "evaluation.every_epochs=1"),
        ({"task": {"name": "sequence_classification"}}, "task.labels"),
    ],
)
def test_each_reason_is_named(values, name):
    found = reasons(**values)
    assert len(found) == 1
    assert found[0].startswith(name)


def test_labels_in_the_config_are_enough():
    assert reasons(task={"name": "sequence_classification", "labels": ["a", "b"]}) == []


def test_a_streamed_order_refuses_what_needs_the_index():
    data = {**STREAMED, "order": "streamed", "shuffle": False}
    lines = contradictions(run_config("runs", data=data, schedule=STEPS))
    found = [line for line in lines if line.startswith("data.order=streamed")]
    assert len(found) == 1
    assert "cannot be used with data.shuffle=false" in found[0]
    assert found[0].endswith("or data.order=indexed.")
