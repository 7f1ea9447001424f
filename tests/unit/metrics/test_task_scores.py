"""Metrics against values worked out by hand, or by the libraries they are taken from."""

from __future__ import annotations

import numpy as np
import pytest

from dist_ft.config.schema import TaskSection
from dist_ft.metrics import task_scores


def task(name: str, *labels: str) -> TaskSection:
    return TaskSection.model_validate({"name": name, "labels": labels})


def test_classification():
    told = np.array([[2.0, 0, 0], [0, 2, 0], [0, 2, 0], [0, 0, 2]])
    found = task_scores.sequence_classification(
        task("sequence_classification", "a", "b", "c"), np.array([0, 1, 2, 2]), told
    )
    assert found["accuracy"] == 0.75 and found["confusion"] == [[1, 0, 0], [0, 1, 0], [0, 1, 1]]
    assert found["f1_macro"] == pytest.approx((1 + 2 / 3 + 2 / 3) / 3)
    assert found["by_label"]["c"] == pytest.approx(
        {"precision": 1, "recall": 0.5, "f1-score": 2 / 3, "support": 2}
    )
    sure = np.exp(2) / (np.exp(2) + 2)
    assert found["calibration_error"] == pytest.approx(abs(sure - 0.75))


def test_a_label_that_does_not_occur_has_its_row():
    found = task_scores.sequence_classification(
        task("sequence_classification", "a", "b"), np.array([0, 0]), np.eye(2)[[0, 0]]
    )
    assert found["by_label"]["b"]["support"] == 0 and found["accuracy"] == 1


def test_sets_of_labels():
    found = task_scores.multi_label(
        task("multi_label", "a", "b"), np.array([[1, 0], [1, 1]]), np.array([[3.0, -1], [2, -2]])
    )
    assert found["accuracy"] == 0.5 and found["f1_micro"] == pytest.approx(0.8)


def test_numbers():
    found = task_scores.regression(task("regression"), np.array([1.0, 2, 3]), np.array([2.0, 3, 4]))
    assert found == pytest.approx({"mse": 1, "mae": 1, "pearson": 1, "spearman": 1})
    flat = task_scores.regression(task("regression"), np.array([1.0, 1]), np.array([1.0, 2]))
    assert flat["mse"] == 0.5 and np.isnan(flat["pearson"]), (
        "a correlation that is not defined is no number"
    )


def test_entities_count_whole():
    names = ("O", "B-PER", "I-PER", "B-ORG")
    found = task_scores.token_classification(
        task("token_classification", *names), [np.array([1, 2, 0, 3])], [np.array([1, 0, 0, 3])]
    )
    assert found["accuracy"] == 0.75 and found["f1"] == 0.5 and found["precision"] == 0.5
    assert found["by_label"]["PER"]["f1-score"] == 0 and found["by_label"]["ORG"]["f1-score"] == 1
    assert found["by_tag"]["I-PER"]["recall"] == 0
    plain = task_scores.token_classification(
        task("token_classification", "NN", "VB"), [np.array([0, 1])], [np.array([0, 1])]
    )
    assert plain["accuracy"] == 1 and "f1" not in plain


def test_answers():
    wanted = np.array([[0, 3, 6], [0, 3, 6], [0, 3, 6], [-1, 0, 0], [2, 1, 1]])
    told = np.array([[0, 3, 6], [0, 5, 8], [5, 3, 6], [-1, 0, 0], [-1, 0, 0]])
    found = task_scores.question_answering(task("question_answering"), wanted, told)
    assert found == pytest.approx({"exact_match": 2 / 5, "f1": (1 + 0.5 + 0 + 1 + 0) / 5})


def test_vectors_find_theirs():
    first = np.eye(3)
    found = task_scores.embedding(
        task("embedding"), first, np.array([[1.0, 0, 0], [1, 0.1, 1], [0, 0.2, 1]])
    )
    assert found["recall@1"] == pytest.approx(2 / 3) and found["mrr"] == pytest.approx(
        (1 + 0.5 + 1) / 3
    )
    assert (
        found["ndcg@10"] == pytest.approx((1 + 1 / np.log2(3) + 1) / 3) and "recall@5" not in found
    )


def test_vectors_that_are_all_alike_find_nothing():
    alike = task_scores.embedding(task("embedding"), np.ones((9, 4)), np.ones((9, 4)))
    assert alike["recall@1"] == 0 and alike["mrr"] == pytest.approx(1 / 9)
    assert (
        task_scores.embedding(task("embedding"), np.full((9, 4), np.nan), np.ones((9, 4)))[
            "recall@5"
        ]
        == 0
    )


def test_tokens():
    assert task_scores.counted_tokens(
        task("masked_lm"), np.array([[1, 4], [2, 2]]), np.zeros(2)
    ) == {"accuracy": 0.5}
