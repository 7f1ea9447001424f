"""Rows of a shard as it lies: where it can be cut, and the rows of its parts in one pass.

Guarantees: memory is bounded by a part (and the row group or record batch it begins in), not by the shard; parts of
plain JSON lines and of Parquet are read without what lies before them, save the row group they are cut from, which is
read once for all parts that are asked for together. A row that can not be decoded is returned as the `DataError` that
says why, so that the caller decides. Does not interpret columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from dist_ft.core.errors import DataError, StorageError
from dist_ft.data.block import END, Part
from dist_ft.data.sources import hub, lines, tables
from dist_ft.data.sources.discovery import Row, Shard, vanished


def survey(shard: Shard, number: int, block_bytes: int) -> list[Part]:
    """Return the parts of shard `number`, each of about `block_bytes` of text.

    Costs what finding the cuts costs: nothing for JSON lines, the footer for Parquet, one pass over compressed files
    and CSV that are larger than a block.
    """
    if shard.kind == "hub":
        return [Part(number, 0, END, hub.BYTES_PER_SHARD)]
    with _present(shard):
        if shard.kind == "jsonl" and not shard.codec:
            return lines.cuts(shard, number, block_bytes)
        if shard.kind == "parquet":
            return tables.parquet_parts(shard, number, block_bytes)
        if shard.kind == "text" or shard.size <= block_bytes // (4 if shard.codec else 1):
            return [Part(number, 0, END, shard.size * (4 if shard.codec else 1))]
        return _surveyed(shard, number, block_bytes)


def _surveyed(shard: Shard, number: int, block_bytes: int) -> list[Part]:
    """Return the parts of a shard that has to be read from its start: row ranges."""
    parts, start, row, size = [], 0, 0, 0
    for num_rows, num_bytes in tables.sizes(shard) if shard.kind == "arrow" else lines.sizes(shard):
        if size and size + num_bytes > block_bytes:
            parts.append(Part(number, start, row, size))
            start, size = row, 0
        row += num_rows
        size += num_bytes
    return [*parts, Part(number, start, END, size)]


def is_sequential(shard: Shard) -> bool:
    """Tell whether a part of the shard can be reached only through all before it: better read all in one pass."""
    return shard.kind in ("csv", "arrow") or bool(shard.codec)


def read(shard: Shard, parts: Sequence[Part]) -> Iterator[tuple[Part, Any]]:
    """Yield (part, its rows) for parts of one shard in ascending order; rows are a list, or an Arrow table.

    Raises:
        DataError: the shard vanished or changed since it was resolved, or can not be decoded.
    """
    with _present(shard):
        if shard.kind == "hub":
            yield parts[0], hub.read(shard.url)
        elif shard.kind in ("parquet", "arrow"):
            yield from tables.read(shard, parts)
        else:
            yield from lines.read(shard, parts)


def rows_of(shard: Shard, block_bytes: int = 16 * 2**20) -> Iterator[Row | DataError]:
    """Yield every row of a shard, read once, about `block_bytes` at a time."""
    for _, rows in read(shard, survey(shard, 0, block_bytes)):
        yield from rows if isinstance(rows, list) else rows.to_pylist()


@contextmanager
def _present(shard: Shard) -> Iterator[None]:
    """Turn the error of a file that is gone into the one that says what that means here."""
    try:
        yield
    except (FileNotFoundError, StorageError) as error:
        if isinstance(error, StorageError) and not isinstance(error.__cause__, FileNotFoundError):
            raise
        raise vanished(shard) from error
