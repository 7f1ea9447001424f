"""Split a shard into ranges, and read the rows of some of them in one pass.

Guarantees: memory is bounded by a range (and the row group or record batch it starts in), not by
the shard. Ranges of plain JSON Lines and of Parquet are read without what precedes them. The
exception is a row group that is split into several ranges: it is read once for all ranges that are
requested together. A row that cannot be decoded is returned as the `DataError` that explains why,
so that the caller decides. Columns are not interpreted here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from dist_ft.core.errors import DataError, StorageError
from dist_ft.data.block import END_OF_SHARD, ShardRange
from dist_ft.data.sources import hub, line_ranges, lines, tables
from dist_ft.data.sources.discovery import Row, Shard, vanished_error
from dist_ft.data.sources.line_reader import MAX_ROW_BYTES

COMPRESSION_RATIO = 4
"""Assumed bytes of text per byte of a compressed file."""


def split_into_ranges(
    shard: Shard, number: int, block_bytes: int, max_row_bytes: int = MAX_ROW_BYTES
) -> list[ShardRange]:
    """Return the ranges of shard `number`, each of about `block_bytes` of text.

    `max_row_bytes` bounds the memory of the pass; see `read_ranges`.

    The cost is that of finding where to split: nothing for JSON Lines; the footer for Parquet; one
    pass over compressed files, CSV and Arrow files that are larger than a block.
    """
    if shard.kind == "hub":
        return [ShardRange(number, 0, END_OF_SHARD, hub.BYTES_PER_SHARD)]

    with _naming_vanished_shard(shard):
        if shard.kind == "jsonl" and not shard.codec:
            return lines.split_by_bytes(shard, number, block_bytes)
        if shard.kind == "parquet":
            return tables.split_parquet(shard, number, block_bytes)

        # A small shard is one range, so that it need not be read to find where to split it.
        ratio = 1
        if shard.codec:
            ratio = COMPRESSION_RATIO
        if shard.kind == "text" or shard.size <= block_bytes // ratio:
            return [ShardRange(number, 0, END_OF_SHARD, shard.size * ratio)]
        return _split_by_rows(shard, number, block_bytes, max_row_bytes)


def _split_by_rows(
    shard: Shard, number: int, block_bytes: int, max_row_bytes: int
) -> list[ShardRange]:
    """Return row ranges of a shard that has to be read from its start."""
    if shard.kind == "arrow":
        sizes = tables.iter_batch_sizes(shard)  # record batches cannot be read in part
    else:
        sizes = lines.iter_row_sizes(shard, max_row_bytes)

    ranges = []
    start = row = range_bytes = 0
    for num_rows, num_bytes in sizes:
        if range_bytes and range_bytes + num_bytes > block_bytes:
            ranges.append(ShardRange(number, start, row, range_bytes))
            start = row
            range_bytes = 0

        row += num_rows
        range_bytes += num_bytes

    # the last range also covers a shard without rows, which is refused later by name
    ranges.append(ShardRange(number, start, END_OF_SHARD, range_bytes))
    return ranges


def is_sequential(shard: Shard) -> bool:
    """Return whether a range can be reached only through all rows before it.

    It is better to read such a shard in one pass.
    """
    return shard.kind in ("csv", "arrow") or bool(shard.codec)


def read_ranges(
    shard: Shard, ranges: Sequence[ShardRange], max_row_bytes: int = MAX_ROW_BYTES
) -> Iterator[tuple[ShardRange, Any]]:
    """Yield (range, its rows) for ascending ranges of one shard; rows are a list or an Arrow table.

    A line of more than `max_row_bytes` (`DataSection.max_row_bytes`) is a row that cannot be used.

    Raises:
        DataError: the shard was removed or changed since discovery, or cannot be decoded.
    """
    with _naming_vanished_shard(shard):
        if shard.kind == "hub":
            yield ranges[0], hub.read_rows(shard.url)
        elif shard.kind in ("parquet", "arrow"):
            yield from tables.read_ranges(shard, ranges, max_row_bytes)
        else:
            yield from lines.read_ranges(shard, ranges, max_row_bytes)


def first_of_each_read(shard: Shard, ranges: Sequence[ShardRange]) -> frozenset[ShardRange]:
    """Return the ranges with which `read_ranges` reads something new; others come from memory."""
    if shard.kind == "jsonl" and not shard.codec and not lines.is_json_file(shard):
        return frozenset(group[0] for group in line_ranges.join_ranges(shard, ranges))
    return frozenset(ranges)


def iter_rows(
    shard: Shard, block_bytes: int = 16 * 2**20, max_row_bytes: int = MAX_ROW_BYTES
) -> Iterator[Row | DataError]:
    """Yield every row of a shard, reading it once, about `block_bytes` at a time."""
    ranges = split_into_ranges(shard, 0, block_bytes, max_row_bytes)
    for _, rows in read_ranges(shard, ranges, max_row_bytes):
        if not isinstance(rows, list):
            rows = rows.to_pylist()
        yield from rows


@contextmanager
def _naming_vanished_shard(shard: Shard) -> Iterator[None]:
    """Turn the error of a file that does not exist into `vanished_error`, which says what to do."""
    try:
        yield
    except (FileNotFoundError, StorageError) as error:
        # storage reports a missing file as the cause of its own error
        if isinstance(error, StorageError) and not isinstance(error.__cause__, FileNotFoundError):
            raise
        raise vanished_error(shard) from error
