"""Cutting: no token twice, none lost but where the policy says so."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dist_ft.data.cache import TokenisedShard
from dist_ft.data.pieces import cut, measure

LENGTHS = st.lists(st.integers(0, 50), max_size=30).map(lambda values: np.array(values, dtype=np.int64))


@given(LENGTHS, st.integers(1, 20))
def test_split_covers_every_token_once(lengths, capacity):
    rows, first, size = cut(lengths, capacity, "split")
    assert (size >= 1).all() and (size <= capacity).all()
    covered = [(row, start + i) for row, start, count in zip(rows, first, size, strict=True) for i in range(count)]
    assert covered == [(row, i) for row, length in enumerate(lengths) for i in range(length)]


@given(LENGTHS, st.integers(1, 20))
def test_truncate_and_drop(lengths, capacity):
    rows, first, size = cut(lengths, capacity, "truncate")
    assert rows.tolist() == np.flatnonzero(lengths).tolist() and not first.any()
    assert size.tolist() == [min(n, capacity) for n in lengths if n]
    rows, first, size = cut(lengths, capacity, "drop")
    assert rows.tolist() == [i for i, n in enumerate(lengths) if 0 < n <= capacity]
    assert size.tolist() == [n for n in lengths if 0 < n <= capacity]


def test_measures_by_hand():
    """Rows of 3, 0, 5 and 2 tokens; the targets of a piece leave out its first token."""
    targets = np.array([0, 1, 1, 1, 0, 0, 0, 1, 1, 0], dtype=np.uint8)
    shard = TokenisedShard(np.arange(10, dtype=np.int32), targets, np.array([0, 3, 3, 8, 10]), "text")
    found = measure(shard, 4, "split")
    assert found.lengths.tolist() == [3, 0, 5, 2] and found.target_counts.tolist() == [2, 0, 2, 1]
    assert found.pieces.tolist() == [[0, 0, 3]] and found.piece_targets.tolist() == [2]
    found = measure(shard, 5, "truncate")
    assert found.pieces.tolist() == [[0, 0, 3], [2, 0, 5]] and found.piece_targets.tolist() == [2, 1]
