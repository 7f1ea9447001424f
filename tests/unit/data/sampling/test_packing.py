"""Packing: nothing lost, nothing overfull, and full."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_ft.data.sampling.packing import pack, sequences_of


@given(
    st.integers(1, 300).flatmap(
        lambda capacity: st.tuples(
            st.just(capacity), st.lists(st.integers(1, capacity), max_size=200)
        )
    )
)
def test_no_sequence_exceeds_capacity(case):
    capacity, lengths = case
    assigned = pack(np.array(lengths, dtype=np.int64), capacity)
    assert len(assigned) == len(lengths)
    fill = np.bincount(assigned, weights=lengths) if lengths else np.array([])
    assert (fill <= capacity).all() and (fill > 0).all()
    # best fit decreasing never needs more than 11/9 of the optimum and one
    assert len(fill) <= 11 / 9 * -(-sum(lengths) // capacity) * 2 + 1


def test_fill_on_lognormal_lengths():
    """Median 350, sigma 1, cut at 2048: at least 98 % of every position is a token."""
    lengths = np.clip(
        np.random.default_rng(0).lognormal(np.log(350), 1, 8 * 4096).astype(np.int64), 1, 2048
    )
    sequences = sum(
        int(pack(lengths[i : i + 4096], 2048).max()) + 1 for i in range(0, len(lengths), 4096)
    )
    assert lengths.sum() / (sequences * 2048) >= 0.98


def test_known_case():
    assert pack(np.array([5, 7, 3, 5]), 10).tolist() == [1, 0, 0, 1]


def test_same_input_same_packing():
    lengths = np.random.default_rng(1).integers(1, 100, 500)
    assert np.array_equal(pack(lengths, 128), pack(lengths.astype(np.int32), 128))


def test_too_long_is_refused():
    with pytest.raises(ValueError, match=r"lengths must lie in 1\.\.8, not 3\.\.9"):
        pack(np.array([3, 9]), 8)


@given(st.lists(st.integers(1, 64), min_size=1, max_size=150), st.integers(0, 2**62))
def test_the_number_of_sequences_follows_from_lengths_alone(lengths, seed):
    """Epochs pack a block differently, and always into as many sequences: steps stay known."""
    lengths = np.array(lengths)
    members, offsets = sequences_of(lengths, 64, True, seed)
    assert sorted(members.tolist()) == list(range(len(lengths)))
    assert len(offsets) - 1 == pack(lengths, 64).max() + 1
    assert all(lengths[members[a:b]].sum() <= 64 for a, b in pairwise(offsets))


def test_epochs_pack_differently():
    lengths = np.full(100, 16)
    found = {sequences_of(lengths, 64, True, seed)[0].tobytes() for seed in range(5)}
    assert len(found) == 5


def test_unshuffled_sequences_follow_their_first_piece():
    members, offsets = sequences_of(np.array([10, 60, 54, 4]), 64, True, None)
    assert [members[a:b].tolist() for a, b in pairwise(offsets)] == [[0, 2], [1, 3]]
    assert [value.tolist() for value in sequences_of(np.array([5, 6]), 64, False, None)] == [
        [0, 1],
        [0, 1, 2],
    ]
    assert [len(value) for value in sequences_of(np.zeros(0, int), 64, True, 3)] == [0, 1]
