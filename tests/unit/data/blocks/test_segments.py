"""Segments: no token occurs twice, and tokens are lost only where the policy allows it."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from unit.data.data_helpers import data_section

from dist_ft.data.blocks.segments import measure_block, segment_bounds, split_into_segments
from dist_ft.data.blocks.token_cache import TokenizedBlock

LENGTHS = st.lists(st.integers(0, 50), max_size=30).map(
    lambda values: np.array(values, dtype=np.int64)
)


@given(LENGTHS, st.integers(1, 20))
def test_split_covers_every_token_once(lengths, capacity):
    rows, first, size = segment_bounds(lengths, capacity, "split").T
    assert (size >= 1).all() and (size <= capacity).all()
    covered = [
        (row, start + i)
        for row, start, count in zip(rows, first, size, strict=True)
        for i in range(count)
    ]
    assert covered == [(row, i) for row, length in enumerate(lengths) for i in range(length)]


@given(LENGTHS, st.integers(1, 20))
def test_truncate_cuts_and_drop_removes_long_rows(lengths, capacity):
    rows, first, size = segment_bounds(lengths, capacity, "truncate").T
    assert rows.tolist() == np.flatnonzero(lengths).tolist() and not first.any()
    assert size.tolist() == [min(n, capacity) for n in lengths if n]
    rows, first, size = segment_bounds(lengths, capacity, "drop").T
    assert rows.tolist() == [i for i, n in enumerate(lengths) if 0 < n <= capacity]
    assert size.tolist() == [n for n in lengths if 0 < n <= capacity]


def test_block_stats_of_a_known_block():
    """Rows of 3, 0, 5 and 2 tokens; the first token of a segment is not a target."""
    targets = np.array([0, 1, 1, 1, 0, 0, 0, 1, 1, 0], dtype=np.uint8)
    block = TokenizedBlock(
        np.arange(10, dtype=np.int32), targets, np.array([0, 3, 3, 8, 10]), "text", (4,), (), ""
    )
    segments, num_targets = split_into_segments(block, 4, "split")
    assert segments.tolist() == [[0, 0, 3]] and num_targets.tolist() == [2]
    segments, num_targets = split_into_segments(block, 5, "truncate")
    assert segments.tolist() == [[0, 0, 3], [2, 0, 5]] and num_targets.tolist() == [2, 1]
    found = measure_block(block, data_section(overlong="truncate"), 4)
    assert (found.num_rows, found.num_segments, found.num_sequences, found.num_left_out) == (
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
    assert measure_block(block, data_section(overlong="truncate"), 4, max_rows=0).num_sequences == 0
