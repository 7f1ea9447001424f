"""Metrics of tasks against values worked out by hand, or by the libraries they come from."""

from __future__ import annotations

import numpy as np
import pytest

from dist_ft.metrics import task_scores


def test_classification_metrics_equal_hand_computed_values():
    logits = np.array([[2.0, 0, 0], [0, 2, 0], [0, 2, 0], [0, 0, 2]])
    scores = task_scores.sequence_classification(("a", "b", "c"), np.array([0, 1, 2, 2]), logits)
    assert scores.values["accuracy"] == 0.75
    assert scores.tables["confusion"] == [[1, 0, 0], [0, 1, 0], [0, 1, 1]]
    assert scores.values["f1_macro"] == pytest.approx((1 + 2 / 3 + 2 / 3) / 3)
    assert scores.tables["by_label"]["c"] == pytest.approx(
        {"precision": 1, "recall": 0.5, "f1-score": 2 / 3, "support": 2}
    )
    confidence = np.exp(2) / (np.exp(2) + 2)
    assert scores.values["calibration_error"] == pytest.approx(abs(confidence - 0.75))


def test_full_confidence_shares_the_last_bin():
    """A right answer at 0.95 and a wrong one at 1.0 are averaged, not counted apart."""
    found = task_scores.calibration_error(np.array([0.95, 1.0]), np.array([True, False]))
    assert found == pytest.approx(abs(0.95 + 1.0 - 1) / 2)


def test_label_that_does_not_occur_has_its_row():
    scores = task_scores.sequence_classification(("a", "b"), np.array([0, 0]), np.eye(2)[[0, 0]])
    assert scores.tables["by_label"]["b"]["support"] == 0 and scores.values["accuracy"] == 1


def test_multi_label_metrics_equal_hand_computed_values():
    scores = task_scores.multi_label(
        ("a", "b"), np.array([[1, 0], [1, 1]]), np.array([[3.0, -1], [2, -2]])
    )
    assert scores.values["accuracy"] == 0.5
    assert scores.values["f1_micro"] == pytest.approx(0.8)


def test_regression_metrics_equal_hand_computed_values():
    scores = task_scores.regression(np.array([1.0, 2, 3]), np.array([2.0, 3, 4]))
    assert scores.values == pytest.approx({"mse": 1, "mae": 1, "pearson": 1, "spearman": 1})
    flat = task_scores.regression(np.array([1.0, 1]), np.array([1.0, 2])).values
    assert flat["mse"] == 0.5
    assert np.isnan(flat["pearson"]), "the correlation is not defined"


def test_entities_count_only_if_they_match_completely():
    names = ("O", "B-PER", "I-PER", "B-ORG")
    scores = task_scores.token_classification(
        names, [np.array([1, 2, 0, 3])], [np.array([1, 0, 0, 3])]
    )
    assert scores.values == {"accuracy": 0.75, "precision": 0.5, "recall": 0.5, "f1": 0.5}
    by_label = scores.tables["by_label"]
    assert by_label["PER"]["f1-score"] == 0 and by_label["ORG"]["f1-score"] == 1
    assert scores.tables["by_tag"]["I-PER"]["recall"] == 0
    plain = task_scores.token_classification(("NN", "VB"), [np.array([0, 1])], [np.array([0, 1])])
    assert plain.values["accuracy"] == 1 and "f1" not in plain.values


def test_answer_metrics_equal_hand_computed_values():
    expected = np.array([[0, 3, 6], [0, 3, 6], [0, 3, 6], [-1, 0, 0], [2, 1, 1]])
    predicted = np.array([[0, 3, 6], [0, 5, 8], [5, 3, 6], [-1, 0, 0], [-1, 0, 0]])
    scores = task_scores.question_answering(expected, predicted)
    assert scores.values == pytest.approx({"exact_match": 2 / 5, "f1": (1 + 0.5 + 0 + 1 + 0) / 5})


def test_embedding_metrics_equal_hand_computed_values():
    values = task_scores.embedding(
        np.eye(3), np.array([[1.0, 0, 0], [1, 0.1, 1], [0, 0.2, 1]])
    ).values
    assert values["recall@1"] == pytest.approx(2 / 3)
    assert values["mrr"] == pytest.approx((1 + 0.5 + 1) / 3)
    assert values["ndcg@10"] == pytest.approx((1 + 1 / np.log2(3) + 1) / 3)
    assert "recall@5" not in values


def test_equal_vectors_and_nan_retrieve_nothing():
    equal = task_scores.embedding(np.ones((9, 4)), np.ones((9, 4))).values
    assert equal["recall@1"] == 0 and equal["mrr"] == pytest.approx(1 / 9)
    nan = task_scores.embedding(np.full((9, 4), np.nan), np.ones((9, 4))).values
    assert nan["recall@5"] == 0


def test_token_accuracy_is_the_share_of_correct_tokens():
    scores = task_scores.token_accuracy(np.array([[1, 4], [2, 2]]))
    assert scores.values == {"accuracy": 0.5}
