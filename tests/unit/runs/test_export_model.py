"""An exported folder has a model card; int8 weights reload, score close, and report what changed."""

from __future__ import annotations

import json
import logging
import re
import shutil

import pytest
import tiny_tasks
import yaml

from dist_ft import api
from dist_ft.config.load import load_config
from dist_ft.core.errors import ConfigError
from dist_ft.inference.predict import Predictor
from dist_ft.runs import export_model, model_card
from dist_ft.runtime import local
from dist_ft.storage.filesystem import Store


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return the base folder and the config of a finished run."""
    base = tiny_tasks.base(tmp_path_factory.mktemp("export"))
    config = load_config(
        tiny_tasks.config(base, "sequence_classification", "exported", schedule={"epochs": 6})
    )
    local.run(config)
    return base, config


def read_card(folder):
    text = (folder / "README.md").read_text()
    _, head, body = text.split("---\n", 2)
    return yaml.safe_load(head), body


def test_the_card_states_facts_of_the_run_and_no_local_path(trained, tmp_path):
    base, config = trained
    assert api.export(config, str(tmp_path / "out")) is None
    head, body = read_card(tmp_path / "out")
    assert head["pipeline_tag"] == "text-classification" and head["library_name"] == "transformers"
    assert "base_model" not in head, "a local folder is not a hub name"
    assert (
        "| base model | bert |" in body
        and "| architecture | BertForSequenceClassification (bert) |" in body
        and "96 samples" in body
        and "23 samples" in body
    )
    assert (
        "animal, drink, food, place" in body
        and f"| seed | {config.run.seed} |" in body
        and "| accuracy | " in body
    )
    assert re.search(r"\| metric \| step 0 \| step \d+ \|", body)
    assert str(base) not in body and str(tmp_path) not in body
    config_again = yaml.safe_load(body.split("```yaml")[1].split("```")[0])
    assert (
        config_again["task"]["name"] == "sequence_classification" and "storage" not in config_again
    )


def test_local_paths_are_cut_to_their_last_part():
    assert (
        model_card._without_local_path("data: /home/me/sets/a.jsonl, s3://bucket/x/*.parquet")
        == "data: a.jsonl, s3://bucket/x/*.parquet"
    )
    assert (
        model_card._without_local_path("org/name and ./mine/x.jsonl")
        == "org/name and ./mine/x.jsonl"
    )


def test_model_is_scored_by_the_runs_data_only_where_they_may_be_read(
    trained, tmp_path, caplog, monkeypatch
):
    _, config = trained
    store = Store(config.run_url)
    by = export_model._config_to_score_by(store, ())
    assert by is not None and by.max_workers == 0
    api.export(config, str(tmp_path / "out"))
    changes = export_model.compare(tmp_path / "out", tmp_path / "out", by)
    assert (
        changes["accuracy"].before
        == changes["accuracy"].after
        == pytest.approx(
            api.evaluate(config, str(tmp_path / "out"))[str(tmp_path / "out")]["accuracy"]
        )
    )

    # the same run from someone else, whose held-out data lie elsewhere
    foreign = tmp_path / "foreign"
    shutil.copytree(config.run_url, foreign)
    stored = yaml.safe_load((foreign / "run.yaml").read_text())
    stored["evaluation"]["data"] = ["s3://evil/x.jsonl"]
    stored["storage"] = {"options": {"s3": {"endpoint_url": "http://127.0.0.1:9"}}}
    (foreign / "run.yaml").write_text(yaml.safe_dump(stored))
    monkeypatch.setattr(logging.getLogger("dist_ft"), "propagate", True)
    with caplog.at_level("WARNING", "dist_ft"):
        assert export_model._config_to_score_by(Store(str(foreign)), ()) is None
    assert "int8 weights are not scored: evaluation.data=s3://evil/x.jsonl: named by" in caplog.text
    assert "dist-ft export CONFIG --int8" in caplog.text
    named = export_model._config_to_score_by(Store(str(foreign)), ("s3://evil",))
    assert named is not None and named.storage.options == {}


def test_int8_weights_reload_score_close_and_are_compared(trained, tmp_path):
    pytest.importorskip("torchao", reason="int8 weights need the extra int8")
    _, config = trained
    changes = api.export(config, str(tmp_path / "small"), int8=True)
    plain = tmp_path / "plain"
    api.export(config, str(plain))
    before, after = changes["accuracy"]
    assert before > 0.5 and abs(before - after) <= 2 / 23
    assert 0 < changes["logits, largest relative difference"][1] < 0.2
    assert changes["ms for 32 tokens"][0] > 0 and changes["ms for 32 tokens"][1] > 0
    head, body = read_card(tmp_path / "small")
    assert "int8" in head["tags"] and "## With int8 weights" in body
    assert json.loads((tmp_path / "small" / "dist_ft.json").read_text())["int8"]["accuracy"] == [
        before,
        after,
    ]
    rows = [{"text": "the quick tea tea"}, {"text": "owls in the night owls"}]
    small, large = Predictor(str(tmp_path / "small")), Predictor(str(plain))
    for one, other in zip(small.predict(rows), large.predict(rows), strict=True):
        assert one["label"] == other["label"] and one["score"] == pytest.approx(
            other["score"], abs=0.05
        )
    onward = config.model_copy(
        update={"model": config.model.model_copy(update={"path": str(tmp_path / "small")})}
    )
    assert any(
        "has int8 weights, which cannot be fine-tuned" in problem for problem in api.check(onward)
    )
    stored = json.loads((tmp_path / "small" / "config.json").read_text())["quantization_config"]
    assert stored["quant_method"] == "torchao"
    assert any(
        "int8" in str(value.dtype) or type(value).__name__.startswith("Int8")
        for value in small.model.state_dict().values()
    )


def test_without_held_out_data_only_logits_are_compared(trained, tmp_path):
    pytest.importorskip("torchao", reason="int8 weights need the extra int8")
    _, config = trained
    api.export(config, str(tmp_path / "one"))
    assert set(export_model.compare(tmp_path / "one", tmp_path / "one", None)) == {
        "MB on disk",
        "ms for 32 tokens",
        "logits, largest relative difference",
    }


def test_int8_cannot_be_combined_with_an_adapter(trained, tmp_path):
    _, config = trained
    with pytest.raises(ConfigError, match=r"--int8: cannot be combined with --adapter"):
        api.export(config, str(tmp_path / "x"), int8=True, adapter=True)
    assert not (tmp_path / "x").exists() and Store(config.run_url).exists("run.yaml")
