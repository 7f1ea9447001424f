"""Packing: no segment is lost, no sequence is overfull, and little space is wasted."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_ft.data.sampling.packing import group_into_sequences, pack_best_fit


@given(
    st.integers(1, 300).flatmap(
        lambda capacity: st.tuples(
            st.just(capacity), st.lists(st.integers(1, capacity), max_size=200)
        )
    )
)
def test_no_sequence_exceeds_capacity(case):
    capacity, lengths = case
    assigned = pack_best_fit(np.array(lengths, dtype=np.int64), capacity)
    assert len(assigned) == len(lengths)
    fill = np.bincount(assigned, weights=lengths) if lengths else np.array([])
    assert (fill <= capacity).all() and (fill > 0).all()
    # best-fit decreasing needs at most 11/9 of the optimum plus one sequence
    assert len(fill) <= 11 / 9 * -(-sum(lengths) // capacity) * 2 + 1


def test_lognormal_lengths_fill_sequences():
    """Median 350, sigma 1, clipped at 2048: at least 98 % of all positions hold a token."""
    lengths = np.clip(
        np.random.default_rng(0).lognormal(np.log(350), 1, 8 * 4096).astype(np.int64), 1, 2048
    )
    sequences = sum(
        int(pack_best_fit(lengths[i : i + 4096], 2048).max()) + 1
        for i in range(0, len(lengths), 4096)
    )
    assert lengths.sum() / (sequences * 2048) >= 0.98


def test_packing_of_a_known_case():
    assert pack_best_fit(np.array([5, 7, 3, 5]), 10).tolist() == [1, 0, 0, 1]


def test_a_free_space_of_one_token_is_filled():
    assert pack_best_fit(np.array([9, 1]), 10).tolist() == [0, 0]


def test_packing_does_not_depend_on_the_integer_type():
    lengths = np.random.default_rng(1).integers(1, 100, 500)
    assert np.array_equal(pack_best_fit(lengths, 128), pack_best_fit(lengths.astype(np.int32), 128))


def test_too_long_segment_is_refused():
    with pytest.raises(ValueError, match=r"lengths must lie in 1\.\.8, not 3\.\.9"):
        pack_best_fit(np.array([3, 9]), 8)


@given(st.lists(st.integers(1, 64), min_size=1, max_size=150), st.integers(0, 2**62))
def test_number_of_sequences_does_not_depend_on_the_seed(lengths, seed):
    """Epochs pack a block differently but into the same number of sequences, so steps stay known."""
    lengths = np.array(lengths)
    members, offsets = group_into_sequences(lengths, 64, True, seed)
    assert sorted(members.tolist()) == list(range(len(lengths)))
    assert len(offsets) - 1 == pack_best_fit(lengths, 64).max() + 1
    assert all(lengths[members[a:b]].sum() <= 64 for a, b in pairwise(offsets))


def test_seeds_pack_differently():
    lengths = np.full(100, 16)
    found = {group_into_sequences(lengths, 64, True, seed)[0].tobytes() for seed in range(5)}
    assert len(found) == 5


def test_unshuffled_sequences_follow_their_first_segment():
    members, offsets = group_into_sequences(np.array([10, 60, 54, 4]), 64, True, None)
    assert [members[a:b].tolist() for a, b in pairwise(offsets)] == [[0, 2], [1, 3]]
    assert [
        value.tolist() for value in group_into_sequences(np.array([5, 6]), 64, False, None)
    ] == [
        [0, 1],
        [0, 1, 2],
    ]
    assert [len(value) for value in group_into_sequences(np.zeros(0, int), 64, True, 3)] == [0, 1]


def test_unpacked_segments_are_sorted_within_each_pool():
    lengths = np.array([9, 5, 7, 1, 8, 2, 6])
    members, offsets = group_into_sequences(lengths, 64, False, None, sort_pool=3)
    assert lengths[members].tolist() == [5, 7, 9, 1, 2, 8, 6]
    assert offsets.tolist() == list(range(8))
