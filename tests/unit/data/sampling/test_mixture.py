"""Mixing: shares and epochs are exact, and any draw can be computed by itself."""

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
    initial_shares,
    is_weighted,
    source_repeats,
    spread_evenly,
)


def section(*sources, **values):
    return data_section(
        train=[{"path": f"s{i}", **source} for i, source in enumerate(sources)], **values
    )


def draws(mixture, first, count, epoch=ENDLESS):
    return [mixture.draw(epoch, number) for number in range(first, first + count)]


def test_initial_shares_by_size_weight_repeat_and_temperature():
    sizes = [100, 300, 600]
    assert initial_shares(section({}, {}, {}), sizes).tolist() == pytest.approx([0.1, 0.3, 0.6])
    assert initial_shares(section({"weight": 1}, {"weight": 1}, {"weight": 2}), sizes).tolist() == [
        0.25,
        0.25,
        0.5,
    ]
    repeated = section({"repeat": 2}, {}, {"repeat": 0.5})
    assert initial_shares(repeated, sizes).tolist() == pytest.approx([0.25, 0.375, 0.375])
    flat = initial_shares(section({}, {}, {}, temperature=1e9), sizes)
    assert flat.tolist() == pytest.approx([1 / 3] * 3)
    assert initial_shares(section({}, {}, {}, temperature=1), sizes).tolist() == pytest.approx(
        [0.1, 0.3, 0.6]
    )
    assert not is_weighted(repeated) and is_weighted(section({}, {}, temperature=2))
    assert not is_weighted(section({"weight": 3})), "a single source has no share"


SIZES = st.lists(st.integers(1, 700), min_size=2, max_size=5)


@settings(max_examples=60, deadline=None)
@given(SIZES, st.integers(1, 9), st.integers(0, 2**62))
def test_epoch_without_weights_draws_each_sequence_once(sizes, lanes, seed):
    mixture = Mixture(section(*[{}] * len(sizes)), sizes, lanes, 1, seed)
    total = sum(sizes)
    for epoch in range(2):
        assert mixture.num_draws(epoch) == total
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
    found = [
        draw for epoch in range(4) for draw in draws(mixture, 0, mixture.num_draws(epoch), epoch)
    ]
    assert len(set(found)) == len(found)
    for source, size in enumerate(sizes):
        assert sorted(number for i, number in found if i == source) == list(
            range(int(4 * repeats[source] * size))
        )


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(0.01, 1), min_size=2, max_size=5), st.integers(1, 6), st.integers(1, 3000)
)
def test_weighted_shares_are_exact_and_no_draw_repeats(weights, lanes, count):
    mixture = Mixture(
        section(*({"weight": weight} for weight in weights)), [10] * len(weights), lanes, 1, 3
    )
    found = draws(mixture, 0, count)
    assert len(set(found)) == count
    shares = np.bincount([source for source, _ in found], minlength=len(weights))
    ideal = np.array(weights) / sum(weights) * count
    assert np.abs(shares - ideal).max() < lanes * (len(weights) + 6)
    for source, least in enumerate(mixture.min_draws_by_source(count)):
        assert {number for i, number in found if i == source} >= set(range(least))


def test_shares_are_exact_within_a_step():
    mixture = Mixture(
        section({"weight": 0.7}, {"weight": 0.2}, {"weight": 0.1}), [10, 10, 10], 64, 1, 0
    )
    for first in range(0, 6400, 640):
        shares = (
            np.bincount([source for source, _ in draws(mixture, first, 640)], minlength=3) / 640
        )
        assert shares == pytest.approx([0.7, 0.2, 0.1], abs=0.05)


def test_lane_takes_every_nth_draw_of_a_source():
    """A lane reads few blocks: except in the tail, draw k of lane l from a source has number k * lanes + l."""
    mixture = Mixture(section({}, {}), [5000, 3000], 4, 1, 0)
    for number in range(7000):
        _, turn = mixture.draw(0, number)
        assert turn % 4 == number % 4


def test_shares_are_interpolated_over_the_run():
    data = section({"weight": 1}, {"weight": 1}, mixing=[{"until_step": 1000, "weights": [1, 0]}])
    mixture = Mixture(data, [10, 10], 2, 4, 0)
    assert mixture.shares_at(0).tolist() == [0.5, 0.5] and mixture.shares_at(500).tolist() == [
        0.75,
        0.25,
    ]
    assert mixture.shares_at(5000).tolist() == [1, 0]

    def share(step, steps=64):
        return np.mean([source == 0 for source, _ in draws(mixture, step * 8, steps * 8)])

    assert share(0) == pytest.approx(0.516, abs=0.03)
    assert share(500) == pytest.approx(0.766, abs=0.03)
    assert share(1100) == 1


def test_draws_are_spread_evenly():
    found = spread_evenly(np.array([90, 10]), 5)
    places = np.flatnonzero(found[:, 0] == 1)
    assert len(places) == 10 and np.diff(places).max() < 25
    assert sorted(map(tuple, found.tolist())) == [(0, i) for i in range(90)] + [
        (1, i) for i in range(10)
    ]


def test_concurrent_threads_draw_the_same(monkeypatch):
    weighted = section({"weight": 1}, {"weight": 3})
    alone, shared = Mixture(weighted, [100, 100], 2, 1, 0), Mixture(weighted, [100, 100], 2, 1, 0)
    shares_at = Mixture.shares_at
    monkeypatch.setattr(
        Mixture, "shares_at", lambda self, step: (time.sleep(0.001), shares_at(self, step))[1]
    )
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda n: shared.draw(ENDLESS, 128 * n), range(20, 24)))
    for number in range(0, 4000, 37):
        assert shared.draw(ENDLESS, number) == alone.draw(ENDLESS, number)


def test_share_is_a_fraction_of_an_epoch():
    data = section({}, {"repeat": 2}, {"share": 0.1}, {"share": 0.3})
    sizes = [40, 10, 1000, 9]
    counts = [times * size for times, size in zip(source_repeats(data, sizes), sizes, strict=True)]
    assert counts == pytest.approx([40, 20, 10, 30])
    mixture = Mixture(data, sizes, num_lanes=2, micro_batch=1, seed=1)
    drawn = [
        mixture.draw(epoch, number)[0]
        for epoch in range(3)
        for number in range(mixture.num_draws(epoch))
    ]
    assert np.bincount(drawn).tolist() == [120, 60, 30, 90]
