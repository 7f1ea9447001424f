"""Blocks: the unit in which a data set is read, tokenized, cached, packed and shuffled.

A block is about `data.block_mib` of consecutive source data: a range of a large shard, or many
small shards. How a data set is split into blocks depends on its shards alone, never on who reads
them. Pure; reads nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

END_OF_SHARD = -1
"""`ShardRange.stop` of a range that extends to the end of its shard."""


@dataclass(frozen=True)
class ShardRange:
    """Consecutive rows of one shard.

    Attributes:
        shard: number of the shard in the data set.
        start: the first byte of plain JSON Lines (a line belongs to the range that it starts in);
            else the first row.
        stop: the byte or row after the last; `END_OF_SHARD` for the end of the shard.
        num_bytes: approximate bytes of text.
        group: the same for all ranges of one row group, each of which costs reading the group;
            else `END_OF_SHARD`.
    """

    shard: int
    start: int
    stop: int
    num_bytes: int
    group: int = END_OF_SHARD


@dataclass(frozen=True)
class Block:
    """Consecutive ranges of one source (its number in data.train)."""

    source: int
    ranges: tuple[ShardRange, ...]

    @property
    def num_bytes(self) -> int:
        """Approximate bytes of text."""
        return sum(shard_range.num_bytes for shard_range in self.ranges)


def group_into_blocks(source: int, ranges: Sequence[ShardRange], block_bytes: int) -> list[Block]:
    """Return the blocks of a source: consecutive ranges, combined up to `block_bytes`."""
    blocks: list[Block] = []
    current: list[ShardRange] = []
    current_bytes = 0

    for shard_range in ranges:
        # A range that is larger than a block becomes a block of its own: ranges are not cut here.
        if current and current_bytes + shard_range.num_bytes > block_bytes:
            blocks.append(Block(source, tuple(current)))
            current = []
            current_bytes = 0

        current.append(shard_range)
        current_bytes += shard_range.num_bytes

    if current:
        blocks.append(Block(source, tuple(current)))
    return blocks


def split_range(shard: int, total: int, num_bytes: int, block_bytes: int) -> list[ShardRange]:
    """Return equal ranges of about `block_bytes` of a shard that can be split anywhere.

    Args:
        shard: its number.
        total: bytes or rows of the shard, in the unit of `start` and `stop`.
        num_bytes: bytes of text in it.
        block_bytes: maximum bytes of text in a range.
    """
    # No more ranges than units, so that none is empty; at least one, as each shard is read.
    count = max(1, min(total, -(-num_bytes // block_bytes)))
    bytes_per_range = -(-num_bytes // count)

    # Multiplying before dividing spreads the remainder: ranges differ by at most one unit, and
    # the last edge is exactly `total`.
    edges = [total * i // count for i in range(count + 1)]
    return [ShardRange(shard, start, stop, bytes_per_range) for start, stop in pairwise(edges)]
