"""A run becomes a folder with a model card; with int8 weights it loads again, scores near, and says what changed."""

from __future__ import annotations

import json
import re

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
    """Return the base folder and the config of a run that is done."""
    base = tiny_tasks.base(tmp_path_factory.mktemp("ship"))
    config = load_config(
        tiny_tasks.config(base, "sequence_classification", "ship", schedule={"epochs": 6})
    )
    local.run(config)
    return base, config


def read_card(folder):
    text = (folder / "README.md").read_text()
    _, head, body = text.split("---\n", 2)
    return yaml.safe_load(head), body


def test_the_card_says_what_was_run_and_no_path_of_this_machine(trained, tmp_path):
    base, config = trained
    assert api.export(config, str(tmp_path / "out")) is None
    head, body = read_card(tmp_path / "out")
    assert head["pipeline_tag"] == "text-classification" and head["library_name"] == "transformers"
    assert "base_model" not in head, "a local folder is no name of the hub"
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


def test_paths_lose_all_but_their_last_part():
    assert (
        model_card._public("data: /home/me/sets/a.jsonl, s3://bucket/x/*.parquet")
        == "data: a.jsonl, s3://bucket/x/*.parquet"
    )
    assert model_card._public("org/name and ./mine/x.jsonl") == "org/name and ./mine/x.jsonl"


def test_int8_weights_load_again_score_near_and_are_told(trained, tmp_path):
    pytest.importorskip("torchao", reason="int8 weights need the extra int8")
    _, config = trained
    told = api.export(config, str(tmp_path / "small"), int8=True)
    plain = tmp_path / "plain"
    api.export(config, str(plain))
    before, after = told["accuracy"]
    assert before > 0.5 and abs(before - after) <= 2 / 23
    assert 0 < told["logits, largest relative difference"][1] < 0.2
    assert told["ms for 32 tokens"][0] > 0 and told["ms for 32 tokens"][1] > 0
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
        "has int8 weights, which can not be fine-tuned" in problem for problem in api.check(onward)
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


def test_an_adapter_alone_has_no_int8_weights(trained, tmp_path):
    _, config = trained
    with pytest.raises(ConfigError, match=r"--int8: with --adapter only an adapter is written"):
        api.export(config, str(tmp_path / "x"), int8=True, adapter=True)
    assert not (tmp_path / "x").exists() and Store(config.run_url).exists("run.yaml")
