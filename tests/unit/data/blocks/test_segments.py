"""Cutting: no token twice, none lost but where the policy says so."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from unit.data.data_helpers import data_section

from dist_ft.data.blocks.segments import cut, measure, pieces_of
from dist_ft.data.blocks.token_cache import TokenisedBlock

LENGTHS = st.lists(st.integers(0, 50), max_size=30).map(
    lambda values: np.array(values, dtype=np.int64)
)


@given(LENGTHS, st.integers(1, 20))
def test_split_covers_every_token_once(lengths, capacity):
    rows, first, size = cut(lengths, capacity, "split")
    assert (size >= 1).all() and (size <= capacity).all()
    covered = [
        (row, start + i)
        for row, start, count in zip(rows, first, size, strict=True)
        for i in range(count)
    ]
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
    block = TokenisedBlock(
        np.arange(10, dtype=np.int32), targets, np.array([0, 3, 3, 8, 10]), "text", (4,), (), ""
    )
    pieces, counts = pieces_of(block, 4, "split")
    assert pieces.tolist() == [[0, 0, 3]] and counts.tolist() == [2]
    pieces, counts = pieces_of(block, 5, "truncate")
    assert pieces.tolist() == [[0, 0, 3], [2, 0, 5]] and counts.tolist() == [2, 1]
    found = measure(block, data_section(overlong="truncate"), 4)
    assert (found.num_rows, found.num_pieces, found.num_sequences, found.num_left_out) == (
        4,
        1,
        1,
        3,
    )
    assert (
        found.num_tokens,
        found.num_targets,
        found.num_too_long,
        found.longest,
        found.longest_row,
    ) == (3, 2, 1, 5, 2)
    assert measure(block, data_section(overlong="truncate"), 4, max_rows=0).num_sequences == 0
