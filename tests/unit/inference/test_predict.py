"""Predictions of trained models, in order, and their metrics without training."""

from __future__ import annotations

import json
import random

import pytest
import tiny_tasks

from dist_ft import api
from dist_ft.config.load import load_config
from dist_ft.core.errors import ConfigError, DataError, ModelError
from dist_ft.data.sources import readers
from dist_ft.data.sources.discovery import discover_shards
from dist_ft.inference import prediction_file
from dist_ft.inference.evaluate import evaluate_models
from dist_ft.inference.model_folder import PredictionOptions
from dist_ft.inference.predict import Predictor
from dist_ft.inference.prediction_file import predict_file
from dist_ft.runtime import local


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_tasks.base(tmp_path_factory.mktemp("predict"))


@pytest.fixture(scope="module")
def trained(base):
    """Return a function: task -> (its config, the folder of its exported model)."""
    made = {}

    def train(task: str):
        if task not in made:
            document = tiny_tasks.config(
                base,
                task,
                "plain",
                schedule={"epochs": 6},
                task={"stride": 2} if task == "question_answering" else {},
            )
            config = load_config(document)
            local.run(config)
            out = str(base / "out" / task)
            api.export(config, out)
            made[task] = config, out
        return made[task]

    return train


def rows(task: str, count: int, seed: int = 1):
    rng = random.Random(seed)
    return [tiny_tasks.row(task, rng) for _ in range(count)]


@pytest.mark.parametrize("task", ["sequence_classification", "token_classification", "regression"])
def test_predictions_give_the_evaluated_metrics(base, trained, task):
    config, out = trained(task)
    found = Predictor(out, PredictionOptions(7)).predict(rows(task, 23))
    scored = evaluate_models(config, [out])[out]
    assert scored["head"] == "trained"
    if task == "sequence_classification":
        right = [
            prediction["label"] == row["label"]
            for prediction, row in zip(found, rows(task, 23), strict=True)
        ]
        assert sum(right) / 23 == pytest.approx(scored["accuracy"]) and scored["accuracy"] > 0.5
    elif task == "token_classification":
        tags = [prediction["tags"] for prediction in found]
        assert [len(own) for own in tags] == [len(row["tokens"]) for row in rows(task, 23)]
        flat = [
            a == b
            for own, row in zip(tags, rows(task, 23), strict=True)
            for a, b in zip(own, row["tags"], strict=True)
        ]
        assert sum(flat) / len(flat) == pytest.approx(scored["accuracy"])
    else:
        errors = [
            (prediction["label"] - row["label"]) ** 2
            for prediction, row in zip(found, rows(task, 23), strict=True)
        ]
        assert sum(errors) / 23 == pytest.approx(scored["mse"], rel=1e-3)


def test_answers_are_spans_of_their_contexts(base, trained):
    _, out = trained("question_answering")
    questions = rows("question_answering", 9)
    for prediction, row in zip(
        Predictor(out, PredictionOptions(4)).predict(questions), questions, strict=True
    ):
        assert prediction["answer"] in row["context"]


def test_text_is_generated(base, trained):
    _, out = trained("seq2seq")
    found = Predictor(out, PredictionOptions(4, 5)).predict(rows("seq2seq", 5))
    assert len(found) == 5 and all(isinstance(prediction["text"], str) for prediction in found)
    alone = Predictor(out, PredictionOptions(1, 5)).predict(rows("seq2seq", 5))
    assert alone == found, "whatever shares a batch"


@pytest.mark.parametrize("strategy", ["beam:3,num_samples=2", "sample:1.5,num_samples=2,seed=4"])
def test_decoding_strategy_is_independent_of_where_a_file_is_cut(
    base, trained, strategy, tmp_path, monkeypatch
):
    _, out = trained("seq2seq")
    whole = Predictor(out, PredictionOptions(4, 6, strategy)).predict(rows("seq2seq", 5))
    assert all(len(prediction["others"]) == 1 for prediction in whole)
    assert strategy.startswith("beam") or all(
        prediction["text"] != prediction["others"][0] for prediction in whole
    )
    assert whole != Predictor(out, PredictionOptions(4, 6)).predict(rows("seq2seq", 5))
    monkeypatch.setattr(prediction_file, "CHUNK_ROWS", 2)
    file = tmp_path / "predictions.jsonl"
    predict_file(
        Predictor(out, PredictionOptions(4, 6, strategy)), iter(rows("seq2seq", 5)), str(file)
    )
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:3]))
    predict_file(
        Predictor(out, PredictionOptions(4, 6, strategy)), iter(rows("seq2seq", 5)), str(file)
    )
    assert [json.loads(line)["prediction"] for line in file.read_text().splitlines()] == whole
    with pytest.raises(DataError, match="holds 5 rows predicted by another model"):
        predict_file(Predictor(out, PredictionOptions(4, 6)), iter(rows("seq2seq", 5)), str(file))


def test_partial_file_is_resumed(base, trained, tmp_path, monkeypatch):
    _, out = trained("sequence_classification")
    source = tiny_tasks.make_data(tmp_path / "in", "sequence_classification", 20, seed=1)
    monkeypatch.setattr(prediction_file, "CHUNK_ROWS", 4)
    predictor = Predictor(out)
    (shards,) = discover_shards(
        load_config(tiny_tasks.config(base, "regression", "x", data={"train": source})).data.train
    )

    def every():
        return (row for shard in shards for row in readers.iter_rows(shard))

    assert predict_file(predictor, every(), str(tmp_path / "whole.jsonl")) == 20
    whole = (tmp_path / "whole.jsonl").read_bytes()
    first = json.loads(whole.splitlines()[0])
    assert (
        set(first) == {"text", "label", "prediction"}
        and first["prediction"]["label"] in tiny_tasks.LABELS
    )
    (tmp_path / "cut.jsonl").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="rows predicted by another model"):
        predict_file(predictor, every(), str(tmp_path / "cut.jsonl"))
    (tmp_path / "cut.jsonl.model").write_text(predictor.version)
    predicted = []
    predict = predictor.predict
    monkeypatch.setattr(
        predictor, "predict", lambda rows, first=0: predicted.extend(rows) or predict(rows, first)
    )
    predict_file(predictor, every(), str(tmp_path / "cut.jsonl"))
    assert 8 <= len(predicted) <= 12
    for one, other in zip(
        (tmp_path / "cut.jsonl").read_bytes().splitlines(), whole.splitlines(), strict=True
    ):
        left, right = json.loads(one), json.loads(other)
        scores = left["prediction"].pop("score"), right["prediction"].pop("score")
        assert left == right and scores[0] == pytest.approx(
            scores[1], abs=1e-5
        )  # rows of other batches: rounding
    with pytest.raises(DataError, match="holds 20 rows, but the input has 3"):
        predict_file(predictor, iter(list(every())[:3]), str(tmp_path / "whole.jsonl"))


def test_untrained_head_is_refused(base, trained):
    config, _ = trained("sequence_classification")
    encoder = str(base / "bert")
    with pytest.raises(
        ModelError, match=r"weights of the head are not in the files, such as .* --random-head"
    ):
        evaluate_models(config, [encoder])
    assert evaluate_models(config, [encoder], random_head=True)[encoder]["head"] == "random"
    with pytest.raises(
        ModelError, match="is a masked language model, which has no answer to a text"
    ):
        Predictor(encoder)


def test_evaluation_needs_held_out_data(base, trained):
    config, out = trained("sequence_classification")
    config = config.model_copy(
        update={"evaluation": config.evaluation.model_copy(update={"data": ()})}
    )
    with pytest.raises(ConfigError, match=r"evaluation\.data: is empty"):
        evaluate_models(config, [out])


def test_row_without_text_is_reported(base, trained):
    _, out = trained("sequence_classification")
    with pytest.raises(DataError, match=r"a row has no text in 'text' \(it has label\)"):
        Predictor(out).predict([{"label": "x"}])


def test_prompt_template_comes_from_the_folder(base, tmp_path):
    import torch
    from transformers import AutoModel

    document = tiny_tasks.config(
        base, "embedding", "first", schedule={"epochs": None, "steps": 2}, task={"pooling": "first"}
    )
    local.run(load_config(document))
    api.export(load_config(document), str(tmp_path / "out"))
    predictor = Predictor(str(tmp_path / "out"))
    assert predictor.task.section.pooling == "first"
    (prediction,) = predictor.predict([{"text": "the quick fox"}])
    with torch.no_grad():
        model = AutoModel.from_pretrained(tmp_path / "out").eval()
        hidden = model(
            **predictor.tokenizer("the quick fox", return_tensors="pt")
        ).last_hidden_state[0, 0]
    assert torch.allclose(torch.tensor(prediction["embedding"]), hidden / hidden.norm(), atol=1e-5)


def test_run_folder_predicts_like_its_export(base, trained, tmp_path):
    config, out = trained("sequence_classification")
    questions = rows("sequence_classification", 5)
    assert Predictor(config.run_url).predict(questions) == Predictor(out).predict(questions)
    with pytest.raises(
        ModelError,
        match=r"is not a model folder \(.*\)\. A folder that `dist-ft export` writes is needed",
    ):
        Predictor(str(tmp_path))


def test_model_with_new_head_is_evaluated_with_it(base, trained):
    config, out = trained("sequence_classification")
    anew = config.model_copy(update={"task": config.task.model_copy(update={"new_head": True})})
    assert evaluate_models(anew, [out])[out]["head"] == "trained"
