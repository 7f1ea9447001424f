"""Slices of the sources that stream: which shard ranges each one reads.

A slice covers bytes of the concatenation of its source's shards (`StreamLayout`). What lies in it
follows from the listing, and for Parquet from the footer:

- a line of plain JSON Lines belongs to the slice it starts in;
- the rows of a Parquet shard lie evenly over its bytes, each in the slice of its first byte;
- a shard that is read from its start (compressed, CSV, ...) belongs to the slice it starts in.

A slice is a `Block` to all that reads and tokenizes. Slices are numbered over all sources.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from dist_ft.data.block import END_OF_SHARD, Block, ShardRange
from dist_ft.data.sampling.stream_order import StreamLayout
from dist_ft.data.sources import lines, readers, tables
from dist_ft.data.sources.discovery import Shard
from dist_ft.data.sources.shard_table import ShardTable

SAMPLE_BITS = 32
"""A sample id is its slice's number + 1, shifted by this, and its row within the slice."""


class SliceNumber(NamedTuple):
    """A slice by its source; `number` counts the slices of the source from 0."""

    source: int
    number: int


class Slices:
    """The slices of all sources that stream."""

    def __init__(self, shards: ShardTable, layouts: Mapping[int, StreamLayout]) -> None:
        """Store the arguments.

        Args:
            shards: shards of all sources.
            layouts: how each source that streams is cut.
        """
        self.shards = shards
        self.layouts = dict(layouts)

        self._first: dict[int, int] = {}
        count = 0
        for source in sorted(self.layouts):
            self._first[source] = count
            count += self.layouts[source].num_slices
        self.count = count
        """Number of slices of all sources."""

    def numbers(self, source: int, own_numbers: np.ndarray) -> np.ndarray:
        """Return the numbers over all sources of slices of one source, int64 (n,)."""
        return own_numbers + self._first[source]

    def find(self, number: int) -> SliceNumber:
        """Return the source of a slice, and its number there."""
        source = max(source for source, first in self._first.items() if first <= number)
        return SliceNumber(source, number - self._first[source])

    def block(self, number: int) -> Block:
        """Return the ranges of a slice; reads the footers of Parquet shards."""
        source, own_number = self.find(number)
        start, stop = self.layouts[source].slice_bounds(own_number)

        ranges = []
        for located in self.shards.locate(source, start, stop):
            shard = self.shards[located.shard]
            # bytes of the shard, of which the slice holds [first, last)
            first = start - located.start
            last = stop - located.start
            shard_range = _range_of_bytes(shard, located.shard, first, last)
            if shard_range is not None:
                ranges.append(shard_range)
        return Block(source, tuple(ranges))


def is_splittable(shard: Shard) -> bool:
    """Whether parts of a shard can be read without what precedes them."""
    if shard.kind == "parquet":
        return True
    return shard.kind == "jsonl" and not shard.codec and not lines.is_json_file(shard)


def first_sample(number: int) -> int:
    """Return the id of the first sample of a slice."""
    return (number + 1) << SAMPLE_BITS


def _range_of_bytes(shard: Shard, number: int, first: int, last: int) -> ShardRange | None:
    """Return the range of a shard's rows in bytes [first, last); None if it holds no row.

    `first` may lie before the shard, and `last` after it.
    """
    if not is_splittable(shard):
        if first > 0:
            return None
        ratio = readers.COMPRESSION_RATIO if shard.codec else 1
        return ShardRange(number, 0, END_OF_SHARD, shard.size * ratio)

    first = max(0, first)
    last = min(shard.size, last)
    if shard.kind == "jsonl":
        return ShardRange(number, first, last, last - first)

    # Row r of n lies at byte r * size / n, so the first row from `first` on is rounded up.
    num_rows, num_bytes = tables.measure_parquet(shard)
    start_row = -(-first * num_rows // shard.size)
    stop_row = -(-last * num_rows // shard.size)
    if start_row == stop_row:
        return None
    bytes_of_rows = num_bytes * (stop_row - start_row) // num_rows
    return ShardRange(number, start_row, stop_row, bytes_of_rows)
