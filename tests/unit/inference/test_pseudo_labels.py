"""Pseudo-labels of a real (tiny) classifier."""

from __future__ import annotations

import json
import random
from collections import Counter

import pytest
import tiny_tasks

from dist_ft import api
from dist_ft.cli import main
from dist_ft.config.load import load_config
from dist_ft.core.errors import ModelError
from dist_ft.inference.predict import Predictor
from dist_ft.inference.pseudo_labels import pseudo_label
from dist_ft.runtime import local
from dist_ft.tasks.base import make_task

KIND = "sequence_classification"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The config of a tiny classifier's run, and the exported model."""
    base = tiny_tasks.base(tmp_path_factory.mktemp("pseudo"))
    config = load_config(tiny_tasks.config(base, KIND, "plain", schedule={"epochs": 3}))
    local.run(config)
    api.export(config, str(base / "out"))
    return config, str(base / "out")


def unlabeled(count: int):
    rng = random.Random(5)
    return [{"id": number, "text": tiny_tasks.row(KIND, rng)["text"]} for number in range(count)]


@pytest.fixture(scope="module")
def predicted(trained):
    """Rows, and the prediction for each."""
    rows = unlabeled(60)
    return rows, Predictor(trained[1]).predict(rows)


def test_confident_rows_are_kept_in_order_and_others_counted(trained, predicted):
    rows, answers = predicted
    bar = sorted(answer["score"] for answer in answers)[30]
    found = pseudo_label(Predictor(trained[1]), iter(rows), bar)
    expected = [
        {**row, "label": answer["label"], "confidence": answer["score"]}
        for row, answer in zip(rows, answers, strict=True)
        if answer["score"] >= bar
    ]
    assert 0 < len(expected) < 60
    assert found.rows == expected
    assert (found.num_unsure, found.num_over, found.num_labeled) == (60 - len(expected), 0, 0)
    assert {label: count for label, count in found.num_kept.items() if count} == Counter(
        row["label"] for row in expected
    )


def test_limit_keeps_the_most_confident_rows_per_label(trained, predicted):
    rows, answers = predicted
    found = pseudo_label(Predictor(trained[1]), iter(rows), 0.0, max_per_label=3)
    assert [row["id"] for row in found.rows] == sorted(row["id"] for row in found.rows)
    for label in tiny_tasks.LABELS:
        scores = sorted((a["score"] for a in answers if a["label"] == label), reverse=True)
        assert (
            sorted((row["confidence"] for row in found.rows if row["label"] == label), reverse=True)
            == scores[:3]
        )
    assert found.num_over == 60 - len(found.rows) > 0


def test_rows_with_a_label_are_left_out(trained):
    rows = unlabeled(4)
    rows[1]["label"], rows[2]["label"] = "drink", None
    found = pseudo_label(Predictor(trained[1]), iter(rows), 0.0)
    assert [row["id"] for row in found.rows] == [0, 2, 3]
    assert found.num_labeled == 1


def test_model_without_one_label_per_text_is_refused(trained):
    predictor = Predictor(trained[1])
    predictor.task = make_task(predictor.task.section.model_copy(update={"name": "multi_label"}))
    with pytest.raises(ModelError, match="a model of task multi_label does not choose one label"):
        pseudo_label(predictor, iter(()), 0.5)


def test_command_reads_a_run_folder_and_writes_training_data(
    trained, tmp_path, monkeypatch, capsys
):
    config, _ = trained
    source, out = tmp_path / "rows.jsonl", tmp_path / "pseudo.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in unlabeled(20)))
    monkeypatch.setattr(
        "sys.argv",
        [
            "dist-ft",
            "data",
            "pseudo",
            config.run_url,
            str(source),
            "--out",
            str(out),
            "--confidence",
            "0",
        ],
    )
    with pytest.raises(SystemExit) as caught:
        main.main()
    assert not caught.value.code, capsys.readouterr().err
    assert len(out.read_text().splitlines()) == 20
    document = json.loads(config.model_dump_json())
    document["run"]["name"] = "with-pseudo"
    document["data"]["train"].append({"path": str(out), "name": "pseudo", "repeat": 0.5})
    document["schedule"] = {"steps": 2}
    result = local.run(load_config(document))
    assert result.step == 2


def test_no_confident_row_is_one_line(trained, tmp_path, monkeypatch, capsys):
    source = tmp_path / "rows.jsonl"
    source.write_text(json.dumps(unlabeled(1)[0]) + "\n")
    monkeypatch.setattr(
        "sys.argv",
        [
            "dist-ft",
            "data",
            "pseudo",
            trained[1],
            str(source),
            "--out",
            str(tmp_path / "x.jsonl"),
            "--confidence",
            "1",
        ],
    )
    with pytest.raises(SystemExit) as caught:
        main.main()
    assert caught.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
