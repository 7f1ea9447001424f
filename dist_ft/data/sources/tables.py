"""Read the rows of Parquet and Arrow files, batch by batch, as Arrow tables."""

from __future__ import annotations

import contextlib
import io
import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from dist_ft.core.errors import DataError, DistFtError
from dist_ft.core.logs import redact
from dist_ft.core.printable import printable_line
from dist_ft.data.block import END_OF_SHARD, ShardRange, split_range
from dist_ft.data.sources import ranged_reads
from dist_ft.data.sources.discovery import Row, RowLocation, Shard

BATCH_ROWS = 256
"""Rows that are decoded at a time. Few, as a page of a few bytes may stand for many long texts."""
MAX_EXPANSION = 16
"""Decoded bytes of a range, by the bytes that the file says it has."""
MIN_EXPANDED_BYTES = 2**30
"""Below this, decoded bytes are not compared: dictionaries and runs take little room in a file."""
ROW_BYTES = 32
"""Least memory of a row, also of one without values."""
MAX_BYTES_PER_GROUP = 2**40
"""Bytes of a row group, or rows: more is a damaged footer."""
_ARROW_FILE_MAGIC = b"ARROW1"


class _Batch(NamedTuple):
    """A pyarrow record batch, and the number of its first row in the shard, from 0."""

    first_row: int
    rows: Any

    @property
    def stop_row(self) -> int:
        """The row after the last."""
        return self.first_row + len(self.rows)


@dataclass(frozen=True)
class _ArrowReader:
    """An open Arrow file.

    Attributes:
        reader: pyarrow's reader of record batches.
        is_file_format: whether the file has the file format, whose batches are read by number;
            else the stream format.
    """

    reader: Any
    is_file_format: bool

    def batches(self) -> Iterator[_Batch]:
        """Yield the record batches in order."""
        batches = self.reader
        if self.is_file_format:
            # lazy: one record batch at a time is in memory
            batches = map(self.reader.get_batch, range(self.reader.num_record_batches))

        first_row = 0
        for rows in batches:
            _require_offsets_inside(rows)
            yield _Batch(first_row, rows)
            first_row += len(rows)


def split_parquet(shard: Shard, number: int, block_bytes: int) -> list[ShardRange]:
    """Return ranges of Parquet shard `number`: whole row groups, or parts of a very large one."""
    with _decoding(shard):
        metadata = _open_parquet(shard).metadata
        row_groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
        # bytes before compression, as blocks are measured by their text
        sizes = [(group.num_rows, group.total_byte_size) for group in row_groups]
        _require_plausible(shard, sizes)

    ranges: list[ShardRange] = []
    start = row = range_bytes = 0
    for num_rows, num_bytes in sizes:
        if row > start and range_bytes + num_bytes > block_bytes:
            ranges.append(ShardRange(number, start, row, range_bytes))
            start = row
            range_bytes = 0

        row += num_rows
        range_bytes += num_bytes

        # One very large row group: split it by rows. Each part costs reading the whole group, so
        # they have the same `group`: the block store reads them in one pass.
        if range_bytes > 2 * block_bytes:
            for part in split_range(number, row - start, range_bytes, block_bytes):
                ranges.append(
                    ShardRange(number, start + part.start, start + part.stop, part.num_bytes, start)
                )

            start = row
            range_bytes = 0

    # a shard without rows has a range too, so that it is refused later by name
    if row > start or not ranges:
        ranges.append(ShardRange(number, start, row, range_bytes))
    return ranges


class ParquetSize(NamedTuple):
    """Rows of a Parquet shard, and their bytes before compression."""

    num_rows: int
    num_bytes: int


def measure_parquet(shard: Shard) -> ParquetSize:
    """Return the size of a Parquet shard, from its footer."""
    with _decoding(shard):
        metadata = _parquet_footer(shard)
        row_groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
        sizes = [(group.num_rows, group.total_byte_size) for group in row_groups]
        _require_plausible(shard, sizes)
        return ParquetSize(sum(rows for rows, _ in sizes), sum(size for _, size in sizes))


def _require_plausible(shard: Shard, sizes: Sequence[tuple[int, int]]) -> None:
    """Refuse a footer whose row groups cannot be: blocks of any size would follow from it."""
    for number, (num_rows, num_bytes) in enumerate(sizes):
        if not (0 <= num_rows <= MAX_BYTES_PER_GROUP and 0 <= num_bytes <= MAX_BYTES_PER_GROUP):
            raise _damaged(
                shard, f"row group {number} is said to have {num_rows} rows of {num_bytes} bytes"
            )


def _require_small_rows(shard: Shard, metadata: Any, groups: Sequence[int], limit: int) -> None:
    """Refuse row groups whose rows are larger on average than a row may be."""
    for number in groups:
        group = metadata.row_group(number)
        if group.num_rows and group.total_byte_size / group.num_rows > limit:
            raise DataError(
                redact(
                    f"{printable_line(shard.url)}: row group {number} has {group.num_rows} rows of "
                    f"{group.total_byte_size / group.num_rows / 2**20:,.0f} MiB each. Allowed: "
                    f"{limit / 2**20:g} MiB. Remove them, or raise data.max_row_mib."
                )
            )


def iter_batch_sizes(shard: Shard) -> Iterator[tuple[int, int]]:
    """Yield (rows, bytes) of every record batch of an Arrow file."""
    with _decoding(shard):
        for batch in _open_arrow(shard).batches():
            yield batch.rows.num_rows, batch.rows.nbytes


def read_ranges(
    shard: Shard, ranges: Sequence[ShardRange], max_row_bytes: int
) -> Iterator[tuple[ShardRange, Any]]:
    """Yield (range, Arrow table of its rows) for ascending ranges, in one pass."""
    with _decoding(shard):
        if shard.kind == "parquet":
            file = _open_parquet(shard)
            batches = _row_groups(shard, file, ranges, max_row_bytes)
            yield from _regroup_by_range(shard, batches, ranges, file.schema_arrow)
        else:
            arrow = _open_arrow(shard)
            yield from _regroup_by_range(shard, arrow.batches(), ranges, arrow.reader.schema)


def _regroup_by_range(
    shard: Shard, batches: Iterator[_Batch], ranges: Sequence[ShardRange], schema: Any
) -> Iterator[tuple[ShardRange, Any]]:
    """Yield (range, table of its rows) from batches in order.

    Batches that end before the range are released.
    """
    import pyarrow

    held: deque[_Batch] = deque()
    held_bytes: deque[int] = deque()
    for part in ranges:
        # a batch at the edge of two ranges is held for both
        while held and held[0].stop_row <= part.start:
            held.popleft()
            held_bytes.popleft()

        # read on until the batches cover the range
        total_bytes = sum(held_bytes)
        while part.stop == END_OF_SHARD or not held or held[-1].stop_row < part.stop:
            batch = next(batches, None)
            if batch is None:
                break
            if batch.stop_row > part.start:
                held.append(batch)
                held_bytes.append(_expanded_bytes(batch.rows))
                total_bytes += held_bytes[-1]
                _require_expected_size(shard, total_bytes, part)

        # the schema is needed where no batch is held
        table = pyarrow.Table.from_batches([batch.rows for batch in held], schema)
        skipped = 0
        if held:
            skipped = part.start - held[0].first_row

        num_rows = None
        if part.stop != END_OF_SHARD:
            num_rows = part.stop - part.start
        yield part, _with_bad_rows(shard, table.slice(skipped, num_rows), part)


def _expanded_bytes(rows: Any) -> int:
    """Return the bytes of a record batch as Python would hold it."""
    num_bytes = rows.num_rows * ROW_BYTES
    for column in rows.columns:
        num_bytes += _expanded_column_bytes(column)
    return num_bytes


def _expanded_column_bytes(column: Any) -> int:
    import pyarrow
    import pyarrow.compute

    kind = column.type
    # Each value of a dictionary is stored once, however many rows have it.
    if pyarrow.types.is_dictionary(kind):
        values = column.dictionary
        size = values.nbytes / max(1, len(values))
        if pyarrow.types.is_string(values.type) or pyarrow.types.is_large_string(values.type):
            lengths = pyarrow.compute.binary_length(values)
            return pyarrow.compute.sum(lengths.take(column.indices)).as_py() or 0
        return int(size * len(column))

    if pyarrow.types.is_struct(kind):
        return sum(map(_expanded_column_bytes, column.flatten()))
    if pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind):
        return column.nbytes + _expanded_column_bytes(column.flatten())
    return int(column.nbytes)


def _require_offsets_inside(rows: Any) -> None:
    """Raise ArrowInvalid for damaged offsets: Arrow would read values wherever they point."""
    import pyarrow

    try:
        rows.validate(full=True)
    except pyarrow.ArrowInvalid as error:
        # Text that is not UTF-8 is a fault of its row, which is named later.
        if "UTF8" not in str(error):
            raise


def _with_bad_rows(shard: Shard, table: Any, part: ShardRange) -> Any:
    """Return a table; if text in it is not UTF-8, its rows, with errors in the place of those."""
    import pyarrow

    try:
        table.validate(full=True)
        return table
    except pyarrow.ArrowInvalid as error:
        if "UTF8" not in str(error):
            raise

    rows: list[Row | DataError] = []
    for number in range(table.num_rows):
        try:
            rows += table.slice(number, 1).to_pylist()
        except UnicodeDecodeError as error:
            location = RowLocation(shard.url, part.start + number + 1)
            rows.append(location.error(f"has text that is not UTF-8 ({error.reason}). Convert it."))
    return rows


def _require_expected_size(shard: Shard, num_bytes: int, part: ShardRange) -> None:
    """Refuse a range whose decoded rows, `num_bytes` so far, are far more than the file says."""
    if num_bytes > max(MAX_EXPANSION * part.num_bytes, MIN_EXPANDED_BYTES):
        raise DataError(
            redact(
                f"{printable_line(shard.url)}: the rows from {part.start + 1} on decode to more "
                f"than {num_bytes / 2**20:,.0f} MiB, where the file says "
                f"{part.num_bytes / 2**20:,.1f}. Write the shard again with smaller row groups."
            )
        )


def _open_parquet(shard: Shard) -> Any:
    """Return the open Parquet file; checksums of pages are verified where the file has them."""
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(
        ranged_reads.RandomAccessFile(shard.url, shard.size),
        metadata=_parquet_footer(shard),
        pre_buffer=True,
        page_checksum_verification=True,
    )


@lru_cache(maxsize=256)
def _parquet_footer(shard: Shard) -> Any:
    """Return the metadata at the end of a shard; cached: every block of the shard needs it."""
    import pyarrow.parquet

    return pyarrow.parquet.read_metadata(ranged_reads.RandomAccessFile(shard.url, shard.size))


def _row_groups(
    shard: Shard, file: Any, ranges: Sequence[ShardRange], max_row_bytes: int
) -> Iterator[_Batch]:
    """Yield the batches of the row groups that hold the ranges, each group once, range by range."""
    metadata = file.metadata
    group_rows = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    edges = [0, *itertools.accumulate(group_rows)]

    # `next_group` lets a group that several ranges share be read once: `_regroup_by_range` holds
    # its batches until the last of them.
    next_group = 0
    for part in ranges:
        stop = part.stop
        if stop == END_OF_SHARD:
            stop = edges[-1]

        groups = []
        for group in range(next_group, metadata.num_row_groups):
            if edges[group] < stop and edges[group + 1] > part.start:
                groups.append(group)
        if not groups:
            continue

        _require_small_rows(shard, metadata, groups, max_row_bytes)
        next_group = groups[-1] + 1
        first_row = edges[groups[0]]
        for rows in file.iter_batches(BATCH_ROWS, row_groups=groups):
            yield _Batch(first_row, rows)
            first_row += len(rows)


def _open_arrow(shard: Shard) -> _ArrowReader:
    """Return the open Arrow file."""
    import pyarrow.ipc

    raw = io.BufferedReader(
        ranged_reads.ReadAheadFile(shard.url, shard.size), ranged_reads.RANGE_BYTES
    )
    # The file format starts with a magic number, the stream format does not.
    magic = raw.peek(len(_ARROW_FILE_MAGIC))[: len(_ARROW_FILE_MAGIC)]
    if magic == _ARROW_FILE_MAGIC:
        return _ArrowReader(pyarrow.ipc.open_file(raw), is_file_format=True)
    return _ArrowReader(pyarrow.ipc.open_stream(raw), is_file_format=False)


@contextlib.contextmanager
def _decoding(shard: Shard) -> Iterator[None]:
    """Turn the errors of the decoder into one `DataError`."""
    import pyarrow

    try:
        yield
    except DistFtError:
        raise  # says already what is wrong; a StorageError must stay retryable
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
        if isinstance(error, FileNotFoundError):
            raise  # `readers` says what to do about a shard that vanished

        # pyarrow appends details of several lines to some messages
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise _damaged(shard, first_line) from error


def _damaged(shard: Shard, reason: str) -> DataError:
    return DataError(
        redact(
            f"{printable_line(shard.url)}: is not valid {shard.kind.capitalize()} "
            f"({printable_line(reason)}). Write the shard again."
        )
    )
