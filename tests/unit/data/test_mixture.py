"""Mixing: shares are kept exactly, by arithmetic, in every lane."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.data.data_helpers import data_section

from dist_ft.data.mixture import ROUND, Mixture, base_weights, quotas, sequences_in_epoch


def section(*sources, **values):
    return data_section(train=[{"path": f"s{i}", **source} for i, source in enumerate(sources)], **values)


def shares(mixture, lane, first, count):
    drawn = np.array([source for source, _ in mixture.draws(lane, first, count)])
    return np.bincount(drawn, minlength=3) / count


def test_weights_of_every_kind():
    sizes = [100, 300, 600]
    assert base_weights(section({}, {}, {}), sizes).tolist() == pytest.approx([0.1, 0.3, 0.6])
    assert base_weights(section({"weight": 1}, {"weight": 1}, {"weight": 2}), sizes).tolist() == [0.25, 0.25, 0.5]
    repeated = section({"repeat": 2}, {}, {"repeat": 0.5})
    assert base_weights(repeated, sizes).tolist() == pytest.approx([0.25, 0.375, 0.375])
    assert sequences_in_epoch(repeated, sizes) == 800 and sequences_in_epoch(section({}, {}, {}), sizes) == 1000
    flat = base_weights(section({}, {}, {}, temperature=1e9), sizes)
    assert flat.tolist() == pytest.approx([1 / 3] * 3)
    assert base_weights(section({}, {}, {}, temperature=1), sizes).tolist() == pytest.approx([0.1, 0.3, 0.6])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(1e-6, 1), min_size=2, max_size=6), st.integers(0, 40))
def test_shares_are_exact_after_every_round(weights, rounds):
    data = section(*({"weight": weight} for weight in weights))
    mixture = Mixture(data, [10] * len(weights), 1, seed=3)
    total = mixture.totals(rounds)
    assert total.sum() == rounds * ROUND
    ideal = np.array(weights) / sum(weights) * rounds * ROUND
    assert np.abs(total - ideal).max() < len(weights)


def test_shares_hold_within_a_round_too():
    mixture = Mixture(section({"weight": 0.7}, {"weight": 0.2}, {"weight": 0.1}), [10, 10, 10], 1, seed=0)
    for lane in range(5):
        assert shares(mixture, lane, 0, 50) == pytest.approx([0.7, 0.2, 0.1], abs=0.05)


@given(st.integers(0, 2000), st.integers(1, 20), st.integers(0, 6))
@settings(max_examples=60, deadline=None)
def test_draws_by_arithmetic_are_those_counted_from_the_start(first, count, lane):
    mixture = Mixture(section({"weight": 1}, {"weight": 3}), [10, 20], 2, seed=1)
    walked = mixture.draws(lane, 0, first + count)
    assert mixture.draws(lane, first, count) == walked[first:]
    for source in range(2):
        turns = [turn for number, turn in walked if number == source]
        assert turns == list(range(len(turns)))


def test_weights_move_over_the_run_in_straight_lines():
    data = section({"weight": 1}, {"weight": 1}, mixing=[{"until_step": 1000, "weights": [1, 0]}])
    mixture = Mixture(data, [10, 10], micro_batch=4, seed=0)
    assert mixture.weights(0).tolist() == [0.5, 0.5] and mixture.weights(500).tolist() == [0.75, 0.25]
    assert mixture.weights(5000).tolist() == [1, 0]
    assert shares(mixture, 0, 0, 256)[0] == pytest.approx(0.5, abs=0.02)
    assert shares(mixture, 0, 2000, 512)[0] == pytest.approx(0.8, abs=0.06)
    assert shares(mixture, 0, 8000, 256)[0] == 1


def test_a_source_that_got_more_gets_nothing_until_it_is_due():
    assert quotas(np.array([-3.0, 10.0]), 10).tolist() == [0, 10]
    assert quotas(np.array([2.5, 2.5, 5.0]), 10).tolist() == [3, 2, 5]
