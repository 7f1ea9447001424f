"""Forgetting scores of a matrix, worked out by hand."""

from __future__ import annotations

import pytest

from dist_ft.metrics.forgetting import ForgettingScores, measure_forgetting

SCORES = [[0.9, None, None], [0.7, 0.8, None], [0.75, 0.5, 0.6]]


def test_average_transfer_and_forgetting_equal_hand_computed_values():
    scores = measure_forgetting(SCORES, "accuracy")
    assert scores == ForgettingScores(
        pytest.approx((0.75 + 0.5 + 0.6) / 3),
        pytest.approx(((0.75 - 0.9) + (0.5 - 0.8)) / 2),
        pytest.approx(((0.9 - 0.75) + (0.8 - 0.5)) / 2),
    )


def test_forgetting_starts_at_the_best_earlier_score_and_transfer_right_after_the_stage():
    scores = measure_forgetting(
        [
            [0.5, None],
            [0.9, 0.8],
        ],
        "accuracy",
    )
    assert (scores.backward_transfer, scores.forgetting) == (
        pytest.approx(0.4),
        pytest.approx(-0.4),
    )
    scores = measure_forgetting([[0.5, 0, 0], [0.9, 0.8, 0], [0.6, 0.8, 0.7]], "f1")
    assert (scores.backward_transfer, scores.forgetting) == (
        pytest.approx(0.05),
        pytest.approx(0.15),
    )


def test_differences_change_sign_for_metrics_better_when_lower():
    scores = measure_forgetting([[1.0, None], [1.5, 0.4]], "loss")
    assert scores == ForgettingScores(pytest.approx(0.95), pytest.approx(-0.5), pytest.approx(0.5))


def test_one_stage_has_only_an_average_and_missing_scores_give_none():
    assert measure_forgetting([[0.4]], "accuracy") == ForgettingScores(0.4, None, None)
    assert measure_forgetting([[0.4, None], [None, 0.5]], "accuracy") is None
    with pytest.raises(ValueError, match="no stages"):
        measure_forgetting([], "accuracy")
