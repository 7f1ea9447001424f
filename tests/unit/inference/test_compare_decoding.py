"""Decoding strategies side by side."""

from __future__ import annotations

import json
import sys

import pytest
import tiny_tasks

from dist_ft.cli import main
from dist_ft.config.load import load_config
from dist_ft.core.errors import ConfigError
from dist_ft.inference.compare_decoding import compare
from dist_ft.inference.evaluate import evaluate_models


@pytest.fixture(scope="module")
def document(tmp_path_factory):
    base = tiny_tasks.base(tmp_path_factory.mktemp("decode"))
    made = tiny_tasks.config(base, "seq2seq", "x")
    made["evaluation"].update(
        {
            "generate_samples": 6,
            "keep_generations": 3,
            "text_metrics": ["chrf", "token_error_rate"],
            "decoding": {"max_new_tokens": 5, "choices": ["bread and tea", "the fox", "rivers"]},
        }
    )
    return made


def test_each_strategy_of_each_model_has_a_row(document):
    config = load_config(document)
    found = compare(config, [config.model.path] * 2, ["greedy", "beam:3", "sample:0.7,seed=2"])
    assert [one["strategy"] for one in found] == ["greedy", "beam:3", "sample:0.7"] * 2
    assert found[0]["generations"] == found[3]["generations"] and len(found[0]["generations"]) == 3
    assert {one["text"] for one in found[0]["generations"]} <= set(
        config.evaluation.decoding.choices
    ), "the default is that of the config"
    assert all(
        one["samples"] == 6 and one["seconds"] > 0 and one["tokens_per_s"] > 0 for one in found
    )
    evaluated = evaluate_models(config, [config.model.path])[config.model.path]
    assert {name: evaluated[name] for name in ("chrf", "token_error_rate", "generations")} == {
        name: found[0][name] for name in ("chrf", "token_error_rate", "generations")
    }


def test_zero_max_new_tokens_is_refused(document):
    config = load_config({**document, "evaluation": {"data": document["evaluation"]["data"]}})
    with pytest.raises(
        ConfigError, match=r"evaluation\.decoding\.max_new_tokens=0: nothing is generated\."
    ):
        compare(config, [config.model.path], ["greedy"])


def test_decode_command_prints_a_table(document, tmp_path, monkeypatch, capsys):
    (tmp_path / "x.yaml").write_text(json.dumps(document))
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "dist-ft",
            "decode",
            str(tmp_path / "x.yaml"),
            "--strategy",
            "greedy",
            "--strategy",
            "beam:2",
        ],
    )
    with pytest.raises(SystemExit) as caught:
        main.main()
    assert not caught.value.code
    shown = capsys.readouterr().out
    assert all(
        word in shown for word in ("greedy", "beam:2", "chrf", "token error rate", "tokens per s")
    )
