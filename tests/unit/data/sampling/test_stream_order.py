"""The streamed order: cuts by arithmetic, windows of lanes, every slice once an epoch."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_ft.data.sampling.stream_order import (
    MIN_BLOCKS_PER_LANE,
    Cursor,
    StreamLayout,
    StreamOrder,
    min_stream_bytes,
    plan_layout,
    slice_bytes,
)


def test_small_sources_do_not_stream():
    smallest = min_stream_bytes(8, 512)
    assert smallest == MIN_BLOCKS_PER_LANE * 8 * slice_bytes(512)
    assert plan_layout(smallest - 1, 8, 512, 2**24) is None
    layout = plan_layout(smallest, 8, 512, 2**24)
    assert layout == StreamLayout(smallest, MIN_BLOCKS_PER_LANE * 8, 1)


@pytest.mark.parametrize("num_bytes", [40_000_000, 200_000_000, 20_000_000_000])
@pytest.mark.parametrize("num_lanes", [1, 8, 64])
def test_blocks_grow_with_the_source_up_to_their_limit(num_bytes, num_lanes):
    layout = plan_layout(num_bytes, num_lanes, 512, 2**24)
    if layout is None:
        assert num_bytes < min_stream_bytes(num_lanes, 512)
        return
    assert layout.num_blocks >= MIN_BLOCKS_PER_LANE * num_lanes
    assert num_bytes / layout.num_blocks <= 2**24
    own_slice = num_bytes / layout.num_slices
    assert slice_bytes(512) / 2 <= own_slice <= 2 * slice_bytes(512)


@given(st.integers(1, 10**12), st.integers(1, 500), st.integers(1, 70))
def test_slices_cover_every_byte_once(num_bytes, num_blocks, slices_per_block):
    layout = StreamLayout(num_bytes, num_blocks, slices_per_block)
    edges = [layout.slice_bounds(number) for number in range(layout.num_slices)]
    assert edges[0][0] == 0 and edges[-1][1] == num_bytes
    assert all(one[1] == two[0] for one, two in pairwise(edges))


@settings(max_examples=60, deadline=None)
@given(
    num_blocks=st.integers(1, 60),
    slices_per_block=st.integers(1, 9),
    num_lanes=st.integers(1, 8),
    shuffle_blocks=st.integers(1, 40),
    seed=st.integers(0, 2**40),
)
def test_every_slice_comes_once_in_an_epoch(
    num_blocks, slices_per_block, num_lanes, shuffle_blocks, seed
):
    num_lanes = min(num_lanes, num_blocks)
    layout = StreamLayout(10**6, num_blocks, slices_per_block)
    order = StreamOrder(layout, num_lanes, seed, shuffle_blocks)
    seen = [Counter(), Counter()]
    for lane in range(num_lanes):
        cursor = Cursor()
        while cursor.epoch < 2:
            window = order.window(lane, cursor)
            assert len(window)
            seen[cursor.epoch].update(window.tolist())
            cursor = order.next_window(lane, cursor)
    for epoch in seen:
        assert epoch == Counter(range(layout.num_slices))


def test_windows_double_up_to_the_share_of_a_lane():
    order = StreamOrder(StreamLayout(10**9, 64, 5), 8, 0, 26)  # 130 slices for 8 lanes
    sizes = []
    cursor = Cursor()
    for _ in range(6):
        sizes.append(len(order.window(3, cursor)))
        cursor = order.next_window(3, cursor)
    assert sizes == [1, 2, 4, 8, 16, 9]  # the rest of the 40 slices of an epoch


def test_windows_within_blocks_do_not_cross_their_ends():
    order = StreamOrder(StreamLayout(10**9, 64, 128), 8, 0, 16)  # 256 slices for each of 8 lanes
    sizes = []
    cursor = Cursor()
    for _ in range(13):
        sizes.append(len(order.window(3, cursor)))
        cursor = order.next_window(3, cursor)
    assert sizes == [1, 2, 4, 8, 16, 32, 32, 32, 1, 32, 32, 32, 32]


def test_a_share_below_a_slice_is_one_slice():
    order = StreamOrder(StreamLayout(10**9, 4096, 4), 512, 0, 16)
    cursor = order.next_window(0, order.next_window(0, Cursor()))
    assert len(order.window(0, cursor)) == 1


def test_the_order_changes_with_epoch_and_seed():
    layout = StreamLayout(10**9, 64, 1)
    first = StreamOrder(layout, 1, 0, 64)
    other = StreamOrder(layout, 1, 1, 64)

    def blocks(order, epoch):
        found = []
        cursor = Cursor(epoch)
        while cursor.epoch == epoch:
            found += order.window(0, cursor).tolist()
            cursor = order.next_window(0, cursor)
        return found

    assert blocks(first, 0) == blocks(StreamOrder(layout, 1, 0, 64), 0)
    assert blocks(first, 0) != blocks(first, 1)
    assert blocks(first, 0) != blocks(other, 0)


def test_windows_have_seeds_of_their_own():
    order = StreamOrder(StreamLayout(10**9, 64, 4), 8, 0, 16)
    seeds = {
        order.window_seed(lane, Cursor(epoch, first))
        for lane in range(8)
        for epoch in range(2)
        for first in range(9)
    }
    assert len(seeds) == 8 * 2 * 9


def test_epochs_done_advances_with_the_draws():
    order = StreamOrder(StreamLayout(10**9, 8, 4), 2, 0, 1)  # 16 slices a lane, windows up to 2
    assert order.epochs_done(0, Cursor(), 0) == 0
    assert order.epochs_done(0, Cursor(1, 4, 1, 5), 10) == 1 + (4 + 2 / 2) / 16
    assert np.isclose(order.epochs_done(1, Cursor(0, 15, 1, 10), 10), 1.0)
