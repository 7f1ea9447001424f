"""Predictions as a folder: split by the input alone, resumed, and refused for other input."""

from __future__ import annotations

import json
import logging
import random

import numpy as np
import pytest
import tiny_tasks

from dist_ft import api
from dist_ft.checkpoint import export
from dist_ft.config.load import load_config
from dist_ft.config.schema import Source
from dist_ft.core.errors import ConfigError, DataError, ModelError, SentError, WorkerError
from dist_ft.data.sources import readers
from dist_ft.data.sources.discovery import discover_shards
from dist_ft.inference import predict_folder, prediction_shards, ray_data
from dist_ft.inference.model_folder import PredictionOptions
from dist_ft.inference.predict import Predictor
from dist_ft.runtime import local
from dist_ft.storage.filesystem import Store


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    base = tiny_tasks.base(tmp_path_factory.mktemp("parts"))
    config = load_config(
        tiny_tasks.config(base, "sequence_classification", "parts", schedule={"epochs": 2})
    )
    local.run(config)
    api.export(config, str(base / "out"))
    return str(base / "out")


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(prediction_shards.split_input, "__defaults__", (600,))


def make_rows(folder, count=40):
    return tiny_tasks.make_data(folder, "sequence_classification", count, seed=3)


def rows_of(path):
    shards = [shard for found in discover_shards([Source(path=str(path))]) for shard in found]
    return [row for shard in shards for row in readers.iter_rows(shard)]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_shards_hold_the_same_rows_in_order_as_one_file(model, tmp_path, suffix):
    source = make_rows(tmp_path / "in")
    shards, rows = api.predict(model, source, str(tmp_path / "predictions"), suffix=suffix)
    assert shards > 4 and rows == 40
    assert api.predict(model, source, str(tmp_path / "predictions.jsonl")) == (1, 40)
    found, expected = rows_of(tmp_path / "predictions"), rows_of(tmp_path / "predictions.jsonl")
    assert (
        [row["text"] for row in found]
        == [row["text"] for row in expected]
        == [row["text"] for row in rows_of(source)]
    )
    for one, other in zip(found, expected, strict=True):
        assert one["prediction"]["label"] == other["prediction"]["label"]
        assert one["prediction"]["score"] == pytest.approx(other["prediction"]["score"], abs=1e-5)


def test_only_missing_shards_are_written_again(model, tmp_path, monkeypatch):
    source = make_rows(tmp_path / "in")
    api.predict(model, source, str(tmp_path / "predictions"))
    store = Store(str(tmp_path / "predictions"))
    names = sorted(name for name in store.list() if name.startswith("part-"))
    whole = {name: store.read(name) for name in names}
    store.remove(names[1])
    made = []
    monkeypatch.setattr(
        predict_folder,
        "write_shard",
        lambda predictor, store, task, write=prediction_shards.write_shard: (
            made.append(task.name),
            write(predictor, store, task),
        )[1],
    )
    _, rows = api.predict(model, source, str(tmp_path / "predictions"))
    assert made == [names[1]] and rows == whole[names[1]].count(b"\n")
    assert {name: store.read(name) for name in names} == whole
    assert api.predict(model, source, str(tmp_path / "predictions"))[1] == 0


def test_folder_of_other_rows_or_format_is_refused(model, tmp_path):
    source = make_rows(tmp_path / "in")
    api.predict(model, source, str(tmp_path / "predictions"))
    for change in (
        {"suffix": "parquet"},
        {"max_new_tokens": 7},
        {"paths": make_rows(tmp_path / "other", 20)},
    ):
        with pytest.raises(
            DataError,
            match="holds predictions of another model, of other rows or in another format",
        ):
            api.predict(
                **{"model": model, "paths": source, "out": str(tmp_path / "predictions"), **change}
            )
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "x.txt").write_text("x")
    with pytest.raises(DataError, match="the folder holds other files"):
        api.predict(model, source, str(tmp_path / "mine"))


def test_bad_row_stops_without_a_shard_of_its_part(model, tmp_path):
    source = make_rows(tmp_path / "in")
    with open(tmp_path / "in" / "shard-1.jsonl", "a") as file:
        file.write(json.dumps({"text": " "}) + "\n")
    with pytest.raises(DataError, match="a row has no text in 'text'"):
        api.predict(model, source, str(tmp_path / "predictions"))
    names = [
        name for name in Store(str(tmp_path / "predictions")).list() if name.startswith("part-")
    ]
    last = max(names)
    number, count = int(last[5:10]), int(last[14:19])
    assert names and number == count - 2, "all but the part with the bad row"


def test_actor_writes_shards_and_returns_errors_as_values(model, tmp_path):
    """What Ray Data calls, without Ray: errors travel as values, for Ray would wrap them beyond recognition."""
    source = make_rows(tmp_path / "in")
    shards = [shard for found in discover_shards([Source(path=source)]) for shard in found]
    tasks = prediction_shards.split_input(shards, "jsonl")
    actor = ray_data.PredictionActor(model, str(tmp_path / "predictions"), PredictionOptions())
    results = actor({"task": np.array([task.to_json() for task in tasks[:2]])})
    assert results["error"] == ["", ""]
    whole = {
        name: Store(str(tmp_path / "predictions")).read(name).count(b"\n")
        for name in Store(str(tmp_path / "predictions")).list()
    }
    assert whole == {task.name: rows for task, rows in zip(tasks[:2], results["rows"], strict=True)}
    no_model = ray_data.PredictionActor(
        str(tmp_path / "none"), str(tmp_path / "other"), PredictionOptions()
    )
    (text,) = no_model({"task": np.array([tasks[0].to_json()])})["error"]
    error = SentError(*json.loads(text)).restore(WorkerError)
    assert type(error) is ModelError and "the folder does not exist" in str(error)
    assert not (tmp_path / "other").exists()


def test_options_of_folders_are_refused_for_a_file(model, tmp_path):
    with pytest.raises(
        ConfigError, match=r"--out=x\.jsonl: a single file is written by one process"
    ):
        api.predict(model, "a.jsonl", "x.jsonl", workers=2)
    with pytest.raises(
        ConfigError, match=r"--format=csv: unknown format\. Allowed: jsonl, parquet"
    ):
        api.predict(model, "a.jsonl", "x", suffix="csv")


def test_flash_attention_model_predicts_on_a_cpu(model, tmp_path, caplog, monkeypatch):
    import shutil

    shutil.copytree(model, tmp_path / "flash")
    about = json.loads((tmp_path / "flash" / export.INFO_FILE).read_text())
    (tmp_path / "flash" / export.INFO_FILE).write_text(
        json.dumps({**about, "attention": "flash_attention_2"})
    )
    rows = [tiny_tasks.row("sequence_classification", random.Random(5)) for _ in range(3)]
    monkeypatch.setattr(logging.getLogger("dist_ft"), "propagate", True)
    with caplog.at_level("WARNING", "dist_ft"):
        predictions = Predictor(str(tmp_path / "flash")).predict(rows)
    assert predictions == Predictor(model).predict(rows)
    assert {line for line in caplog.messages if "flash" in line} == {
        "model.attention=flash_attention_2: needs a GPU; using sdpa, which computes the same"
    }
