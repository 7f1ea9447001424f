"""The stored state of trials, and the report of a search."""

from __future__ import annotations

import json

import pytest

from dist_ft.config.search import Search, SearchSection
from dist_ft.core.errors import ConfigError, DocumentError
from dist_ft.storage.filesystem import Store
from dist_ft.workflows import ray_tune, search_report
from dist_ft.workflows.search import (
    Journal,
)
from dist_ft.workflows.trial import (
    RESULT_FILE,
    Trial,
)

DOCUMENT = {
    "model": {"path": "m"},
    "data": {"train": "a"},
    "batch": {"global_batch": 4, "sequence_length": 8},
    "schedule": {"steps": 9},
    "evaluation": {"data": "b", "every_steps": 3},
}


def make_search(folder, document=None, **fields) -> Search:
    section = SearchSection.model_validate(
        {
            "name": "find",
            "search": "grid",
            "space": {"optimizer.learning_rate": [1e-3, 1e-4]},
            **fields,
        }
    )
    return Search(section, {**DOCUMENT, **(document or {}), "run": {"storage": str(folder)}}, ())


def journal(folder, search=None) -> Journal:
    search = search or make_search(folder)
    return Journal(
        Store(f"{folder}/find"), search, search.config(search.section.point(0)), lambda text: None
    )


def test_reports_of_trials_are_stored_and_read_again(tmp_path):
    first = journal(tmp_path)
    for number in (0, 1, 2):
        first.on_start(number, {"optimizer.learning_rate": 0.1 * number})
    for step, value in ((3, 0.9), (6, 0.7), (6, 0.7)):  # Ray Tune repeats the last one
        first.on_evaluation(0, step, value)
    Store(f"{tmp_path}/find-t0").write(RESULT_FILE, b'{"step": 9}')
    Store(f"{tmp_path}/find-t2").write(RESULT_FILE, b'{"error": "no such file"}')
    first.on_end(0, failed=False)
    first.on_end(1, failed=False)
    first.on_end(2, failed=True)
    again = journal(tmp_path).trials
    assert [(t.state, t.value, t.step, t.error) for t in again.values()] == [
        ("done", 0.7, 6, ""),
        ("stopped", None, 0, ""),
        ("failed", None, 0, "no such file"),
    ]
    assert again[0].reports == ((3, 0.9), (6, 0.7))


def test_a_resumed_trial_keeps_its_time_and_repeats_its_evaluations(tmp_path):
    first = journal(tmp_path)
    first.on_start(0, {"optimizer.learning_rate": 0.1})
    first.on_evaluation(0, 3, 0.9)
    held = json.loads(first.store.read("trials.json"))
    held["trials"][0]["seconds"] = 100.0
    first.store.write("trials.json", json.dumps(held).encode())
    again = journal(tmp_path)
    again.on_start(0, {"optimizer.learning_rate": 0.1})
    assert again.trials[0].reports == ()
    again.on_evaluation(0, 3, 0.9)
    assert 100 <= again.trials[0].seconds < 110


@pytest.mark.parametrize(
    ("earlier", "failed", "expected"),
    [
        (b'{"error": "no such file"}', True, ("failed", "its process was lost")),
        (b'{"step": 9}', False, ("stopped", "")),
    ],
)
def test_a_retried_trial_does_not_end_as_an_earlier_start_did(tmp_path, earlier, failed, expected):
    Store(f"{tmp_path}/find-t0").write(RESULT_FILE, earlier)
    again = journal(tmp_path)
    again.on_start(0, {"optimizer.learning_rate": 0.1})
    again.on_end(0, failed=failed)
    assert (again.trials[0].state, again.trials[0].error) == expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"space": {"optimizer.learning_rate": [1e-3]}},
            "space: the search was started with",
        ),
        ({"seed": 3}, "seed: "),
        ({"document": {"schedule": {"steps": 10}}}, "schedule.steps=10: trials of this search"),
    ],
)
def test_another_search_of_the_same_name_is_refused_in_one_line(tmp_path, changes, expected):
    journal(tmp_path).on_start(0, {})
    with pytest.raises(ConfigError) as caught:
        journal(tmp_path, make_search(tmp_path, **changes))
    assert len(caught.value.problems) == 1 and caught.value.problems[0].startswith(expected)


def test_num_trials_max_concurrent_and_operational_fields_may_change(tmp_path):
    journal(tmp_path).on_start(0, {})
    assert journal(
        tmp_path, make_search(tmp_path, {"log": {"every_steps": 4}}, trials=9, max_concurrent=2)
    ).trials


def test_a_search_that_0_1_0_started_resumes_with_the_new_names(tmp_path):
    space = {"anomaly.max_consecutive": [2, 3], "model.checkpoint": ["latest", "best"]}
    search = make_search(tmp_path, space=space)
    journal(tmp_path, search).on_start(
        0, {"anomaly.max_consecutive": 2, "model.checkpoint": "latest"}
    )
    store = Store(f"{tmp_path}/find")
    text = store.read("trials.json").decode()
    for new, old in (
        ("anomaly.max_consecutive", "anomaly.most_in_a_row"),
        ('"max_consecutive"', '"most_in_a_row"'),
        ('"max_concurrent"', '"at_once"'),
        ('"latest"', '"newest"'),
    ):
        assert new in text
        text = text.replace(new, old)
    store.write("trials.json", text.encode())

    trials = journal(tmp_path, search).trials

    assert trials[0].values == {"anomaly.max_consecutive": 2, "model.checkpoint": "latest"}


@pytest.mark.parametrize(("metric", "order"), [("loss", [2, 0, 1]), ("accuracy", [0, 2, 1])])
def test_the_best_trial_comes_first(tmp_path, metric, order):
    search = make_search(
        tmp_path,
        {
            "checkpoint": {"best_by": metric},
            "task": {"name": "causal_lm" if metric == "loss" else "masked_lm"},
        },
    )
    base = search.config(search.section.point(0))
    trials = [
        Trial(0, {"optimizer.learning_rate": 1e-3}, "done", ((3, 0.8),), 2.0),
        Trial(1, {"optimizer.learning_rate": 1e-4}, "failed", error="it broke"),
        Trial(2, {"optimizer.learning_rate": 1e-2}, "stopped", ((3, 0.9), (6, 0.7)), 1.0),
    ]
    report = search_report.gather(search.section, base, "url", trials)
    assert [one["trial"] for one in report["trials"]] == order and report["best"] == order[0]
    assert "- trial 1: it broke" in search_report.as_markdown(report)
    assert "| 2 | 0.01 | 0.7000 | 6 | 1.0 | stopped |" in search_report.as_markdown(report)
    assert search_report.as_picture(report).startswith(b"\x89PNG")


def test_missing_optuna_is_one_line(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    with pytest.raises(ConfigError) as caught:
        ray_tune.require_optuna()
    assert caught.value.problems[0].startswith("search=optuna: optuna is not installed. ")


@pytest.mark.parametrize("content", [b"", b'{"trials": [', b"[]", b"{}", b'{"search": 1}'])
def test_fault_26_a_damaged_state_is_refused_in_one_line(tmp_path, content):
    journal(tmp_path)  # stores nothing yet
    first = journal(tmp_path)
    first.on_start(0, {"optimizer.learning_rate": 1e-3})
    first.store.write("trials.json", content)
    with pytest.raises(DocumentError, match=r"trials.json: ") as caught:
        journal(tmp_path)
    assert "\n" not in str(caught.value)
