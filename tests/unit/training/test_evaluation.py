"""What is stored of an evaluation, and reading what version 0.1.0 stored."""

from __future__ import annotations

import json

import pytest

from dist_ft.storage.filesystem import Store
from dist_ft.training.evaluation import Evaluation, read_evaluation, store_evaluation


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(str(tmp_path / "run"))


def test_evaluation_with_tables_is_stored_and_read(store):
    table = {"a": {"precision": 1.0}}
    evaluation = Evaluation({"loss": 2.0, "accuracy": 0.5}, {"by_label": table}, examples=[])
    store_evaluation(store, 7, evaluation)
    assert read_evaluation(store, 7) == {
        "loss": 2.0,
        "accuracy": 0.5,
        "by_label": table,
        "examples": [],
    }
    assert read_evaluation(store, 8) == {}


def test_evaluation_with_metrics_only_is_not_stored(store):
    store_evaluation(store, 7, Evaluation({"loss": 2.0}))
    assert not store.exists("evaluations")


def test_keys_of_version_0_1_0_are_renamed(store):
    example = {"sample": 1, "wanted": "x", "told": "y", "score": 0.9}
    old = {"loss": 2.0, "examples": [example], "texts": [{"sample": 1, "text": "t"}]}
    store.write("evaluations/step-000000007.json", json.dumps(old).encode())
    assert read_evaluation(store, 7) == {
        "loss": 2.0,
        "examples": [{"sample": 1, "expected": "x", "predicted": "y", "score": 0.9}],
        "generations": [{"sample": 1, "text": "t"}],
    }
