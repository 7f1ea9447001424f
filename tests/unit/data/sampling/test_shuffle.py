"""Order: a permutation, a pure function of seed and epoch, and the same for ever."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dist_ft.data.sampling.shuffle import epoch_order, hashes, mix

GOLDEN_ORDER = [4, 9, 3, 0, 6, 7, 5, 1, 8, 2]
GOLDEN_MIX = 8119519447357249846


@given(st.integers(0, 3000), st.integers(0, 2**63 - 1), st.integers(0, 10**6))
def test_every_sample_once(num_samples, seed, epoch):
    order = epoch_order(num_samples, seed, epoch)
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(num_samples))


def test_golden_values_never_change():
    """A run resumed by a later version must meet the same samples."""
    assert epoch_order(10, 0, 0).tolist() == GOLDEN_ORDER
    assert mix(1, 2, 3) == GOLDEN_MIX


def test_seed_and_epoch_change_the_order():
    orders = {
        tuple(epoch_order(50, seed, epoch).tolist()) for seed in range(5) for epoch in range(5)
    }
    assert len(orders) == 25


def test_unshuffled_is_as_it_lies():
    assert epoch_order(5, 3, 1, shuffle=False).tolist() == [0, 1, 2, 3, 4]


def test_mix_depends_on_each_value_and_on_order():
    seen = {mix(a, b, c) for a in range(8) for b in range(8) for c in range(8)}
    assert len(seen) == 512
    assert len({mix(), mix(0), mix(0, 0)}) == 3
    assert all(0 <= value < 2**63 for value in seen)
    assert mix(-1) != mix(1) and 0 <= mix(2**200) < 2**63


def test_hashes_differ_and_look_uniform():
    values = hashes(7, 100_000)
    assert len(np.unique(values)) == 100_000
    counts = np.bincount((values >> np.uint64(60)).astype(int), minlength=16)
    assert abs(counts - 6250).max() < 500


def test_neighbours_are_torn_apart():
    order = epoch_order(10_000, 1, 0)
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.05
