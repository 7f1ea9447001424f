"""The streamed order: which slices of a source a lane reads, known before any row is read.

A source is the concatenation of its shards' bytes. It is cut into blocks of equal bytes, and each
block into slices of equal bytes, by arithmetic from the number of bytes alone. Each epoch permutes
the blocks. Lane l takes blocks l, l + L, l + 2L, ... of that order, and moves on to its next epoch
by itself. It packs and shuffles within windows of consecutive slices of its own. Windows double
from one slice, so that the first step needs one slice of each lane.

Only how many sequences a window holds depends on the data, so a lane's place is a `Cursor`.

Guarantees: every slice occurs once in an epoch of its source; nothing depends on the number of
workers. Pure; reads nothing.

L is the number of lanes, N the number of blocks of a source, k the slices of a block.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from dist_ft.core.seeds import derive_seed
from dist_ft.data.sampling.shuffle import epoch_order

SEQUENCES_PER_SLICE = 64
"""Sequences that a slice holds, about: enough for packing to fill them."""
BYTES_PER_TOKEN = 4
"""Bytes of text of a token, about."""
MIN_BLOCKS_PER_LANE = 32
"""Blocks that a source gives each lane: fewer, and lanes would drift apart within an epoch."""
MAX_WINDOW_SLICES = 32
"""Slices of the largest window: a lane that resumes reads and tokenizes a whole window."""
_CACHED_EPOCHS = 4


class StreamLayout(NamedTuple):
    """How a source is cut.

    Attributes:
        num_bytes: bytes of its shards.
        num_blocks: N, blocks of equal bytes.
        slices_per_block: k, slices of equal bytes.
    """

    num_bytes: int
    num_blocks: int
    slices_per_block: int

    @property
    def num_slices(self) -> int:
        """Slices of the source."""
        return self.num_blocks * self.slices_per_block

    def slice_bounds(self, number: int) -> tuple[int, int]:
        """Return the first byte of a slice in the source, and the byte after its last."""
        start = self.num_bytes * number // self.num_slices
        stop = self.num_bytes * (number + 1) // self.num_slices
        return start, stop


def slice_bytes(sequence_length: int) -> int:
    """Return the bytes of a slice, about."""
    return SEQUENCES_PER_SLICE * sequence_length * BYTES_PER_TOKEN


def min_stream_bytes(num_lanes: int, sequence_length: int) -> int:
    """Return the bytes of the smallest source that streams."""
    return MIN_BLOCKS_PER_LANE * num_lanes * slice_bytes(sequence_length)


def plan_layout(
    num_bytes: int, num_lanes: int, sequence_length: int, block_bytes: int
) -> StreamLayout | None:
    """Return how a source is cut; None if it is too small to stream.

    Args:
        num_bytes: bytes of its shards.
        num_lanes: L.
        sequence_length: tokens of a sequence.
        block_bytes: largest block (`data.block_mib`), unless a slice is larger.
    """
    if num_bytes < min_stream_bytes(num_lanes, sequence_length):
        return None

    # Each lane has at least `MIN_BLOCKS_PER_LANE` blocks, and a block at least one slice.
    target_bytes = slice_bytes(sequence_length)
    block = min(block_bytes, num_bytes // (MIN_BLOCKS_PER_LANE * num_lanes))
    block = max(block, target_bytes)

    num_blocks = -(-num_bytes // block)
    slices_per_block = max(1, block // target_bytes)
    return StreamLayout(num_bytes, num_blocks, slices_per_block)


class Cursor(NamedTuple):
    """Where a lane is in a source: the next sequence that it draws.

    Attributes:
        epoch: epoch of the source in which the lane is, from 0.
        first: first slice of its window, counted over the lane's slices of the epoch.
        doubling: the window has 2 ** doubling slices, unless a limit ends it before.
        draws: sequences of the window that were drawn.
    """

    epoch: int = 0
    first: int = 0
    doubling: int = 0
    draws: int = 0


class StreamOrder:
    """The windows of all lanes in one source."""

    def __init__(
        self, layout: StreamLayout, num_lanes: int, seed: int, shuffle_blocks: int
    ) -> None:
        """Store the settings; compute nothing yet.

        Args:
            layout: how the source is cut.
            num_lanes: L.
            seed: seed of the source.
            shuffle_blocks: blocks over which all lanes together shuffle.
        """
        self.layout = layout
        self._num_lanes = num_lanes
        self._seed = seed
        # All lanes together hold at most `shuffle_blocks` blocks, in windows of equal size.
        share = layout.slices_per_block * shuffle_blocks // num_lanes
        self._max_slices = max(1, min(share, MAX_WINDOW_SLICES))
        self._blocks = lru_cache(_CACHED_EPOCHS)(self._compute_blocks)

    def num_slices(self, lane: int, epoch: int) -> int:
        """Return the slices of a lane in an epoch."""
        return len(self._blocks(epoch)[lane :: self._num_lanes]) * self.layout.slices_per_block

    def window(self, lane: int, cursor: Cursor) -> np.ndarray:
        """Return the slices of a cursor's window, int64 (n,), in the order of the lane."""
        slices_per_block = self.layout.slices_per_block
        places = np.arange(cursor.first, cursor.first + self._window_size(lane, cursor))

        blocks = self._blocks(cursor.epoch)[lane :: self._num_lanes]
        return blocks[places // slices_per_block] * slices_per_block + places % slices_per_block

    def next_window(self, lane: int, cursor: Cursor) -> Cursor:
        """Return the start of the window after a cursor's."""
        first = cursor.first + self._window_size(lane, cursor)
        doubling = cursor.doubling
        if 1 << doubling < self._max_slices:
            doubling += 1

        # Windows end with an epoch: no slice comes before the lane is in its epoch.
        if first >= self.num_slices(lane, cursor.epoch):
            return Cursor(cursor.epoch + 1, 0, doubling)
        return Cursor(cursor.epoch, first, doubling)

    def window_seed(self, lane: int, cursor: Cursor) -> int:
        """Return the seed by which a window is packed and shuffled."""
        return derive_seed(self._seed, cursor.epoch, lane, cursor.first)

    def epochs_done(self, lane: int, cursor: Cursor, num_sequences: int) -> float:
        """Return the epochs of the source that a lane has completed, with their fraction.

        `num_sequences`: sequences of the cursor's window; 0: unknown.
        """
        done_slices = float(cursor.first)
        if num_sequences:
            done_slices += self._window_size(lane, cursor) * cursor.draws / num_sequences
        return cursor.epoch + done_slices / self.num_slices(lane, cursor.epoch)

    def _window_size(self, lane: int, cursor: Cursor) -> int:
        """Return the number of slices of a cursor's window."""
        size = min(1 << cursor.doubling, self._max_slices)

        # Within a block a window is read by one request, so windows that fit into one stay in it.
        slices_per_block = self.layout.slices_per_block
        if self._max_slices <= slices_per_block:
            return min(size, slices_per_block - cursor.first % slices_per_block)
        return min(size, self.num_slices(lane, cursor.epoch) - cursor.first)

    def _compute_blocks(self, epoch: int) -> np.ndarray:
        """Return the order of the blocks in an epoch, int64 (N,)."""
        return epoch_order(self.layout.num_blocks, self._seed, epoch)
