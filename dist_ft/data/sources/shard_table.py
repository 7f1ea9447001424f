"""The shards of all sources as columns of one file, which the processes of a node map into memory.

A data set may have a million shards: here they take no Python objects, and a worker that resumes
needs no listing. The file has the Arrow IPC format; a `Shard` is created when it is read.

n is the number of shards of a source.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dist_ft.core.errors import DataError
from dist_ft.data.sources.discovery import Shard

COLUMNS = ("source", "url", "kind", "size", "version")
BATCH_SHARDS = 10_000


class ShardStart(NamedTuple):
    """A shard, and where in its source it starts.

    Attributes:
        shard: number of the shard over all sources.
        start: bytes of the source before it.
    """

    shard: int
    start: int


def write_table(path: Path, shards_by_source: Iterable[Iterable[Shard]]) -> None:
    """Write the shards of each source to a file; few at a time are in memory."""
    import pyarrow

    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_file(sink, _schema()) as writer:
        for source, shards in enumerate(shards_by_source):
            remaining = iter(shards)
            while batch := list(itertools.islice(remaining, BATCH_SHARDS)):
                columns = {
                    "source": [source] * len(batch),
                    "url": [shard.url for shard in batch],
                    "kind": [shard.kind for shard in batch],
                    "size": [shard.size for shard in batch],
                    "version": [shard.version for shard in batch],
                }
                writer.write_batch(pyarrow.RecordBatch.from_pydict(columns, _schema()))


def check_table(path: Path) -> None:
    """Check all values of a table that comes from a run's folder.

    Raises:
        DataError: it is damaged.
    """
    import pyarrow

    try:
        # Read and not mapped: what is mapped counts as memory of the process.
        with pyarrow.OSFile(str(path), "rb") as source:
            reader = pyarrow.ipc.open_file(source)
            for number in range(reader.num_record_batches):
                reader.get_batch(number).validate(full=True)
    except (pyarrow.ArrowException, OSError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> DataError:
    first_line = (str(error).splitlines() or [type(error).__name__])[0]
    return DataError(
        f"{path.name}: the table of shards is damaged ({first_line}). Restore it from a copy; "
        "without it the run cannot continue."
    )


class ShardTable:
    """The shards of all sources, source after source."""

    def __init__(self, path: Path) -> None:
        """Map a file of `write_table`.

        Raises:
            DataError: it is damaged.
        """
        import pyarrow

        try:
            self._table = pyarrow.ipc.open_file(pyarrow.memory_map(str(path), "r")).read_all()
            if self._table.schema != _schema():
                raise ValueError(f"columns {self._table.schema.names}")
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise _damaged(path, error) from error

        sources = self._table.column("source").to_numpy()
        sizes = self._table.column("size").to_numpy()
        if (sizes < 0).any() or (np.diff(sources) < 0).any():
            raise _damaged(path, ValueError("sizes or order of sources"))

        num_sources = int(sources.max(initial=-1)) + 1
        self._first = np.searchsorted(sources, np.arange(num_sources + 1))
        self._ends = [
            np.cumsum(sizes[start:stop])
            for start, stop in zip(self._first[:-1], self._first[1:], strict=True)
        ]

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getitem__(self, number: int) -> Shard:
        """Return a shard."""
        if not 0 <= number < len(self):
            raise IndexError(f"shard {number} of {len(self)}")
        values: list[Any] = [self._table.column(name)[number].as_py() for name in COLUMNS[1:]]
        return Shard(*values)

    def num_shards(self, source: int) -> int:
        """Return the number of shards of a source."""
        return len(self._ends[source])

    def total_bytes(self, source: int) -> int:
        """Return the bytes of all shards of a source."""
        return int(self._ends[source][-1])

    def iter_source(self, source: int) -> Iterator[Shard]:
        """Yield the shards of a source; few at a time are in memory."""
        first, stop = int(self._first[source]), int(self._first[source + 1])
        for start in range(first, stop, BATCH_SHARDS):
            rows = self._table.slice(start, min(BATCH_SHARDS, stop - start)).to_pylist()
            for row in rows:
                yield Shard(row["url"], row["kind"], row["size"], row["version"])

    def locate(self, source: int, first_byte: int, stop_byte: int) -> list[ShardStart]:
        """Return the shards of a source that hold any of the bytes [first_byte, stop_byte)."""
        ends = self._ends[source]  # (n,)
        first = int(np.searchsorted(ends, first_byte, side="right"))
        last = int(np.searchsorted(ends, stop_byte, side="left"))

        found = []
        for number in range(first, min(last + 1, len(ends))):
            start = int(ends[number - 1]) if number else 0
            found.append(ShardStart(int(self._first[source]) + number, start))
        return found


def _schema() -> Any:
    import pyarrow

    return pyarrow.schema(
        [
            ("source", pyarrow.int32()),
            ("url", pyarrow.string()),
            ("kind", pyarrow.string()),
            ("size", pyarrow.int64()),
            ("version", pyarrow.string()),
        ]
    )
