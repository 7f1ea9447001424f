"""Epoch order: a permutation that is a pure function of seed and epoch and never changes."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dist_ft.data.sampling.shuffle import epoch_order

GOLDEN_ORDER = [4, 9, 3, 0, 6, 7, 5, 1, 8, 2]


@given(st.integers(0, 3000), st.integers(0, 2**63 - 1), st.integers(0, 10**6))
def test_order_contains_each_item_once(num_items, seed, epoch):
    order = epoch_order(num_items, seed, epoch)
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(num_items))


def test_golden_order_never_changes():
    """A run resumed by a later version must see the same samples."""
    assert epoch_order(10, 0, 0).tolist() == GOLDEN_ORDER


def test_seed_and_epoch_change_the_order():
    orders = {
        tuple(epoch_order(50, seed, epoch).tolist()) for seed in range(5) for epoch in range(5)
    }
    assert len(orders) == 25


def test_without_shuffling_order_is_storage_order():
    assert epoch_order(5, 3, 1, shuffle=False).tolist() == [0, 1, 2, 3, 4]


def test_neighboring_items_are_separated():
    order = epoch_order(10_000, 1, 0)
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.05
