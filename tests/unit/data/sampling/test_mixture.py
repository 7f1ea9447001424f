"""Mixing: shares are kept exactly, epochs are exact, and any draw is found by arithmetic."""

import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.data.data_helpers import data_section

from dist_ft.data.sampling.mixture import (
    ENDLESS,
    Mixture,
    is_weighted,
    repeats,
    spread,
    weights_at_start,
)


def section(*sources, **values):
    return data_section(
        train=[{"path": f"s{i}", **source} for i, source in enumerate(sources)], **values
    )


def draws(mixture, first, count, epoch=ENDLESS):
    return [mixture.draw(epoch, number) for number in range(first, first + count)]


def test_weights_of_every_kind():
    sizes = [100, 300, 600]
    assert weights_at_start(section({}, {}, {}), sizes).tolist() == pytest.approx([0.1, 0.3, 0.6])
    assert weights_at_start(
        section({"weight": 1}, {"weight": 1}, {"weight": 2}), sizes
    ).tolist() == [0.25, 0.25, 0.5]
    repeated = section({"repeat": 2}, {}, {"repeat": 0.5})
    assert weights_at_start(repeated, sizes).tolist() == pytest.approx([0.25, 0.375, 0.375])
    flat = weights_at_start(section({}, {}, {}, temperature=1e9), sizes)
    assert flat.tolist() == pytest.approx([1 / 3] * 3)
    assert weights_at_start(section({}, {}, {}, temperature=1), sizes).tolist() == pytest.approx(
        [0.1, 0.3, 0.6]
    )
    assert not is_weighted(repeated) and is_weighted(section({}, {}, temperature=2))
    assert not is_weighted(section({"weight": 3})), "one source has no share"


SIZES = st.lists(st.integers(1, 700), min_size=2, max_size=5)


@settings(max_examples=60, deadline=None)
@given(SIZES, st.integers(1, 9), st.integers(0, 2**62))
def test_without_weights_every_epoch_holds_every_sequence_once(sizes, lanes, seed):
    mixture = Mixture(section(*[{}] * len(sizes)), sizes, lanes, 1, seed)
    total = sum(sizes)
    for epoch in range(2):
        assert mixture.size(epoch) == total
        found = Counter(draws(mixture, 0, total, epoch))
        assert found == Counter(
            (source, epoch * size + i) for source, size in enumerate(sizes) for i in range(size)
        )


@settings(max_examples=40, deadline=None)
@given(
    SIZES,
    st.integers(1, 5),
    st.lists(st.sampled_from([0.3, 0.5, 1, 2, 3.25]), min_size=5, max_size=5),
)
def test_repeats_are_exact_over_epochs(sizes, lanes, repeats):
    mixture = Mixture(
        section(*({"repeat": repeat} for repeat in repeats[: len(sizes)])), sizes, lanes, 1, 1
    )
    found = [draw for epoch in range(4) for draw in draws(mixture, 0, mixture.size(epoch), epoch)]
    assert len(set(found)) == len(found)
    for source, size in enumerate(sizes):
        assert sorted(number for i, number in found if i == source) == list(
            range(int(4 * repeats[source] * size))
        )


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(0.01, 1), min_size=2, max_size=5), st.integers(1, 6), st.integers(1, 3000)
)
def test_with_weights_shares_are_kept_and_nothing_is_drawn_twice(weights, lanes, count):
    mixture = Mixture(
        section(*({"weight": weight} for weight in weights)), [10] * len(weights), lanes, 1, 3
    )
    found = draws(mixture, 0, count)
    assert len(set(found)) == count
    shares = np.bincount([source for source, _ in found], minlength=len(weights))
    ideal = np.array(weights) / sum(weights) * count
    assert np.abs(shares - ideal).max() < lanes * (len(weights) + 6)
    for source, least in enumerate(mixture.drawn_by_all(count)):
        assert {number for i, number in found if i == source} >= set(range(least))


def test_shares_hold_within_a_step_too():
    mixture = Mixture(
        section({"weight": 0.7}, {"weight": 0.2}, {"weight": 0.1}), [10, 10, 10], 64, 1, 0
    )
    for first in range(0, 6400, 640):
        shares = (
            np.bincount([source for source, _ in draws(mixture, first, 640)], minlength=3) / 640
        )
        assert shares == pytest.approx([0.7, 0.2, 0.1], abs=0.05)


def test_a_lane_keeps_to_its_own_draws_of_a_source():
    """So that it reads few blocks: the k-th draw of lane l from a source is number k * lanes + l, but for the tail."""
    mixture = Mixture(section({}, {}), [5000, 3000], 4, 1, 0)
    for number in range(7000):
        _, turn = mixture.draw(0, number)
        assert turn % 4 == number % 4


def test_weights_move_over_the_run_in_straight_lines():
    data = section({"weight": 1}, {"weight": 1}, mixing=[{"until_step": 1000, "weights": [1, 0]}])
    mixture = Mixture(data, [10, 10], 2, 4, 0)
    assert mixture.weights(0).tolist() == [0.5, 0.5] and mixture.weights(500).tolist() == [
        0.75,
        0.25,
    ]
    assert mixture.weights(5000).tolist() == [1, 0]

    def share(step, steps=64):
        return np.mean([source == 0 for source, _ in draws(mixture, step * 8, steps * 8)])

    assert share(0) == pytest.approx(0.516, abs=0.03)
    assert share(500) == pytest.approx(0.766, abs=0.03)
    assert share(1100) == 1


def test_spread_evenly():
    found = spread(np.array([90, 10]), 5)
    places = np.flatnonzero(found[:, 0] == 1)
    assert len(places) == 10 and np.diff(places).max() < 25
    assert sorted(map(tuple, found.tolist())) == [(0, i) for i in range(90)] + [
        (1, i) for i in range(10)
    ]


def test_threads_that_draw_at_once_see_the_same_shares(monkeypatch):
    weighted = section({"weight": 1}, {"weight": 3})
    alone, shared = Mixture(weighted, [100, 100], 2, 1, 0), Mixture(weighted, [100, 100], 2, 1, 0)
    weights = Mixture.weights
    monkeypatch.setattr(
        Mixture, "weights", lambda self, step: (time.sleep(0.001), weights(self, step))[1]
    )
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda n: shared.draw(ENDLESS, 128 * n), range(20, 24)))
    for number in range(0, 4000, 37):
        assert shared.draw(ENDLESS, number) == alone.draw(ENDLESS, number)


def test_a_share_is_that_of_an_epochs_sequences():
    data = section({}, {"repeat": 2}, {"share": 0.1}, {"share": 0.3})
    sizes = [40, 10, 1000, 9]
    counts = [times * size for times, size in zip(repeats(data, sizes), sizes, strict=True)]
    assert counts == pytest.approx([40, 20, 10, 30])
    mixture = Mixture(data, sizes, num_lanes=2, micro_batch=1, seed=1)
    drawn = [
        mixture.draw(epoch, number)[0]
        for epoch in range(3)
        for number in range(mixture.size(epoch))
    ]
    assert np.bincount(drawn).tolist() == [120, 60, 30, 90]
