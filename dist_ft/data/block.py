"""Blocks: the pieces of a data set that are read, tokenised, cached, packed and shuffled as one.

A block is some `data.block_mib` of consecutive source data: a part of a large shard, or many small shards. How a data
set falls into blocks follows from its shards alone, never from who reads them. Pure; reads nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

END = -1
"""`Part.stop` of a part that goes to the end of its shard."""


@dataclass(frozen=True)
class Part:
    """Consecutive rows of one shard.

    Attributes:
        shard: number of the shard in the data set.
        start: the first byte of plain JSON lines (a line belongs to the part it begins in), else the first row.
        stop: the first byte or row after it; `END` for the end of the shard.
        num_bytes: about how much text it holds.
        group: the same for parts of a shard that are cut from one row group, so that each costs reading it; else `END`.
    """

    shard: int
    start: int
    stop: int
    num_bytes: int
    group: int = END


@dataclass(frozen=True)
class Block:
    """Consecutive parts of one source (its number in data.train)."""

    source: int
    parts: tuple[Part, ...]

    @property
    def num_bytes(self) -> int:
        """About how much text it holds."""
        return sum(part.num_bytes for part in self.parts)


def make_blocks(source: int, parts: Sequence[Part], block_bytes: int) -> list[Block]:
    """Return the blocks of a source: parts in order, put together until they hold `block_bytes`."""
    blocks: list[Block] = []
    group: list[Part] = []
    size = 0
    for part in parts:
        if group and size + part.num_bytes > block_bytes:
            blocks.append(Block(source, tuple(group)))
            group, size = [], 0
        group.append(part)
        size += part.num_bytes
    return [*blocks, Block(source, tuple(group))] if group else blocks


def cut_range(shard: int, total: int, num_bytes: int, block_bytes: int) -> list[Part]:
    """Return equal parts of about `block_bytes` of a shard that can be cut anywhere.

    Args:
        shard: its number.
        total: bytes or rows of the shard: what `start` and `stop` count.
        num_bytes: bytes of text in it.
        block_bytes: most bytes of text a part.
    """
    count = max(1, min(total, -(-num_bytes // block_bytes)))
    edges = [total * i // count for i in range(count + 1)]
    return [Part(shard, start, stop, -(-num_bytes // count)) for start, stop in pairwise(edges)]
