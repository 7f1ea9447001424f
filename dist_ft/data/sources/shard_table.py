"""Placeholder of helper L's table: shards in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from dist_ft.data.sources.discovery import Shard


class ShardStart(NamedTuple):
    """A shard, and where in its source it starts.

    Attributes:
        shard: number of the shard over all sources.
        start: bytes of the source before it.
    """

    shard: int
    start: int


class ShardTable:
    """The shards of all sources, source after source."""

    def __init__(self, shards: Sequence[Sequence[Shard]]) -> None:
        """Store the shards of each source."""
        self._shards = [shard for own in shards for shard in own]
        self._ends = [np.cumsum([shard.size for shard in own], dtype=np.int64) for own in shards]
        self._first = np.cumsum([0, *(len(own) for own in shards)]).tolist()

    def __getitem__(self, number: int) -> Shard:
        """Return a shard."""
        return self._shards[number]

    def num_shards(self, source: int) -> int:
        """Return the number of shards of a source."""
        return len(self._ends[source])

    def total_bytes(self, source: int) -> int:
        """Return the bytes of all shards of a source."""
        return int(self._ends[source][-1])

    def iter_source(self, source: int) -> Iterator[Shard]:
        """Yield the shards of a source."""
        yield from self._shards[self._first[source] : self._first[source + 1]]

    def locate(self, source: int, first_byte: int, stop_byte: int) -> list[ShardStart]:
        """Return the shards of a source that hold any of the bytes [first_byte, stop_byte)."""
        ends = self._ends[source]
        first = int(np.searchsorted(ends, first_byte, side="right"))
        last = int(np.searchsorted(ends, stop_byte, side="left"))
        found = []
        for number in range(first, min(last + 1, len(ends))):
            start = int(ends[number - 1]) if number else 0
            found.append(ShardStart(self._first[source] + number, start))
        return found
