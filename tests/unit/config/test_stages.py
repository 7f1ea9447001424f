"""The runs of a stages file: start checkpoint, replay, and errors in the file."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from dist_ft.config.schema import Source
from dist_ft.config.stages import StageSources, load_stages, with_replay
from dist_ft.core.errors import ConfigError

BASE = {
    "run": {"name": "ignored", "storage": "runs", "seed": 3},
    "model": {"path": "org/base", "revision": "v1"},
    "data": {"overlong": "truncate"},
    "task": {"name": "sequence_classification"},
    "batch": {"global_batch": 4, "sequence_length": 8},
    "schedule": {"epochs": 2},
}


def write(folder: Path, stages: list, base: dict | None = None, **fields) -> str:
    (folder / "base.yaml").write_text(yaml.safe_dump(base or BASE))
    path = folder / "stages.yaml"
    path.write_text(
        yaml.safe_dump({"name": "seq", "config": "base.yaml", "stages": stages, **fields})
    )
    return str(path)


def stage(name: str, **fields) -> dict:
    return {
        "name": name,
        "overrides": {"data.train": f"{name}.jsonl", "evaluation": {"data": f"{name}-held.jsonl"}},
        **fields,
    }


def problems(path: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load_stages(path)
    return caught.value.problems


def test_each_stage_is_a_run_that_starts_from_the_previous_one(tmp_path):
    found = load_stages(
        write(tmp_path, [stage("a"), stage("b"), stage("c")], checkpoint="best"),
        ["schedule.epochs=5"],
    )
    runs = [one.config for one in found.stages]
    assert [run.run.name for run in runs] == ["seq-a", "seq-b", "seq-c"]
    assert [run.model.path for run in runs] == ["org/base", "runs/seq-a", "runs/seq-b"]
    assert [run.model.revision for run in runs] == ["v1", None, None]
    assert [run.model.checkpoint for run in runs] == ["latest", "best", "best"]
    assert [run.task.grow_head for run in runs] == [False, True, True]
    assert all(
        run.schedule.epochs == 5 and run.run.seed == 3 and run.data.overlong == "truncate"
        for run in runs
    )
    assert [run.evaluation.data[0].path for run in runs] == [
        "a-held.jsonl",
        "b-held.jsonl",
        "c-held.jsonl",
    ]
    assert (found.url, found.metric, found.checkpoint) == ("runs/seq", "accuracy", "best")


def test_replay_gets_its_share_in_equal_parts(tmp_path):
    found = load_stages(write(tmp_path, [stage("a"), stage("b"), stage("c", replay=0.3)]))
    sources = found.stages[2].config.data.train
    assert [(s.path, s.name, s.share) for s in sources] == [
        ("c.jsonl", None, None),
        ("a.jsonl", "replay-a-0", 0.15),
        ("b.jsonl", "replay-b-0", 0.15),
    ]
    assert len(found.stages[1].config.data.train) == 1


def test_replayed_data_of_a_stage_is_not_replayed_again(tmp_path):
    found = load_stages(
        write(tmp_path, [stage("a"), stage("b", replay=0.2), stage("c", replay=0.2)])
    )
    assert [s.path for s in found.stages[2].config.data.train] == ["c.jsonl", "a.jsonl", "b.jsonl"]


def test_replay_has_weights_if_the_sources_have():
    own = (Source(path="x", weight=3), Source(path="y", weight=1))
    found = with_replay(
        own, 0.2, [StageSources("a", (Source(path="a", repeat=4), Source(path="b")))]
    )
    assert [(s.weight, s.repeat, s.share) for s in found] == [
        (pytest.approx(0.6), None, None),
        (pytest.approx(0.2), None, None),
        (0.1, None, None),
        (0.1, None, None),
    ]


def test_all_problems_are_reported_at_once_with_their_stage(tmp_path):
    first = stage("a", replay=0.5)
    second = stage("a")
    second["overrides"]["optimizer.learning_rat"] = 1
    third = {"name": "c", "overrides": {"data.train": "c", "task.labels": ["x", "y"]}}
    lines = problems(write(tmp_path, [first, second, third], metric="mse"))
    assert any(line.startswith("stage a: replay=0.5: there is no previous stage") for line in lines)
    assert any("learning_rat" in line and line.startswith("stage a: ") for line in lines)
    assert "two are named a" in " ".join(lines)
    assert any(line.startswith("metric=mse: ") for line in lines)
    assert any(line.startswith("stage c: evaluation.data: is empty") for line in lines)


def test_a_problem_of_the_shared_config_is_reported_once(tmp_path):
    base = {**BASE, "batch": {"global_batch": 3, "micro_batch": 2, "sequence_length": 8}}
    assert (
        sum(
            "batch.global_batch=3" in line
            for line in problems(write(tmp_path, [stage("a"), stage("b")], base))
        )
        == 1
    )


def test_a_missing_label_of_the_previous_stage_is_refused(tmp_path):
    a, b = stage("a"), stage("b")
    a["overrides"]["task.labels"], b["overrides"]["task.labels"] = ["x", "y"], ["y", "z"]
    (line,) = problems(write(tmp_path, [a, b]))
    assert line.startswith("stage b: task.labels: x of stage a is missing")


@pytest.mark.parametrize(
    ("stages", "start"),
    [
        ([], "stages: "),
        ([{"name": "A b"}], "stages.0.name: "),
        ([{"name": "a", "replay": 1}], "stages.0.replay: "),
        ([{"name": "a", "replays": 1}], "stages.0.replays: "),
    ],
)
def test_an_invalid_file_names_the_field(tmp_path, stages, start):
    assert any(line.startswith(start) for line in problems(write(tmp_path, stages)))


def test_replay_with_a_temperature_is_refused(tmp_path):
    b = stage("b", replay=0.1)
    b["overrides"]["data.temperature"] = 2
    assert (
        "stage b: replay=0.1: data.temperature or data.mixing"
        in problems(write(tmp_path, [stage("a"), b]))[0]
    )


def test_a_misspelled_field_of_a_stage_is_reported_once(tmp_path):
    (found,) = problems(write(tmp_path, [stage("a", replai=0.1)]))
    assert found.startswith(
        "stages.0.replai: extra inputs are not permitted. Allowed: name, replay, overrides"
    )
