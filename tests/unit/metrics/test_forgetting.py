"""What a matrix of scores tells of forgetting: by hand."""

from __future__ import annotations

import pytest

from dist_ft.metrics.forgetting import Kept, kept

SCORES = [[0.9, None, None], [0.7, 0.8, None], [0.75, 0.5, 0.6]]


def test_average_transfer_and_forgetting_by_hand():
    found = kept(SCORES, "accuracy")
    assert found == Kept(
        pytest.approx((0.75 + 0.5 + 0.6) / 3),
        pytest.approx(((0.75 - 0.9) + (0.5 - 0.8)) / 2),
        pytest.approx(((0.9 - 0.75) + (0.8 - 0.5)) / 2),
    )


def test_forgetting_is_from_the_best_before_and_transfer_from_just_after_learning():
    found = kept(
        [
            [0.5, None],
            [0.9, 0.8],
        ],
        "accuracy",
    )
    assert (found.backward_transfer, found.forgetting) == (pytest.approx(0.4), pytest.approx(-0.4))
    found = kept([[0.5, 0, 0], [0.9, 0.8, 0], [0.6, 0.8, 0.7]], "f1")
    assert (found.backward_transfer, found.forgetting) == (pytest.approx(0.05), pytest.approx(0.15))


def test_metrics_that_are_better_when_lower_turn_their_sign():
    found = kept([[1.0, None], [1.5, 0.4]], "loss")
    assert found == Kept(pytest.approx(0.95), pytest.approx(-0.5), pytest.approx(0.5))


def test_one_stage_has_only_an_average_and_missing_scores_tell_nothing():
    assert kept([[0.4]], "accuracy") == Kept(0.4, None, None)
    assert kept([[0.4, None], [None, 0.5]], "accuracy") is None
    with pytest.raises(ValueError, match="no stages"):
        kept([], "accuracy")
