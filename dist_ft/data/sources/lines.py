"""Read the rows of JSON Lines, CSV and plain text, compressed or not, as a stream."""

from __future__ import annotations

import csv
import itertools
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from dist_ft.core.errors import DataError, DistFtError
from dist_ft.core.json_documents import decode_json
from dist_ft.core.logs import redact
from dist_ft.core.printable import printable_line
from dist_ft.data.block import END_OF_SHARD, ShardRange, split_range
from dist_ft.data.sources import csv_rows, line_ranges, ranged_reads
from dist_ft.data.sources.discovery import Row, RowLocation, Shard
from dist_ft.data.sources.line_reader import (
    ByteMeter,
    LongLine,
    iter_chunks,
    iter_lines,
    open_shard,
    read_lines,
)

MAX_TEXT_BYTES = 2**30
"""Bytes of a .txt file (one row), and of a .json file that is one array: all is in memory."""
MAX_EXPANSION = 16
"""Bytes of a range that is read, by the bytes that were expected of it."""
MIN_EXPANDED_BYTES = 256 * 2**20
"""Below this, the content of a compressed shard is not compared with its size."""
MAX_BAD_ROWS = 100_000
"""Bad rows of a range: each has an error in memory, whatever data.max_bad_rows allows."""
_UTF8_BOM = b"\xef\xbb\xbf"


def split_by_bytes(shard: Shard, number: int, block_bytes: int) -> list[ShardRange]:
    """Return byte ranges of a plain .jsonl shard; a .json file may be one array: not split."""
    if is_json_file(shard):
        return [ShardRange(number, 0, END_OF_SHARD, shard.size)]

    # Anywhere, also within a line: a line belongs to the range that it starts in. So no byte is
    # read to find where to split.
    return split_range(number, shard.size, shard.size, block_bytes)


def is_json_file(shard: Shard) -> bool:
    """Return whether the name ends in .json, which may be one array, and not in .jsonl."""
    return ".json" in shard.url.lower() and ".jsonl" not in shard.url.lower()


def iter_row_sizes(shard: Shard, max_row_bytes: int) -> Iterator[tuple[int, int]]:
    """Yield (1, bytes) for every row, in one pass."""
    with _decoding(shard):
        if shard.kind == "csv":
            yield from csv_rows.iter_row_sizes(shard, max_row_bytes)
        else:
            # blank lines are no rows, here as in `_json_rows`: ranges are row numbers
            for line in read_lines(shard, max_row_bytes, ByteMeter()):
                if isinstance(line, LongLine):
                    yield 1, line.max_bytes  # the rest of it is never in memory
                elif line.strip():
                    yield 1, len(line)


def read_ranges(
    shard: Shard, ranges: Sequence[ShardRange], max_row_bytes: int
) -> Iterator[tuple[ShardRange, list[Row | DataError]]]:
    """Yield (range, its rows) in one pass; see `readers.read_ranges`."""
    with _decoding(shard):
        meter = ByteMeter()
        if shard.kind == "text":
            yield ranges[0], [_text_row(shard)]
        elif shard.kind == "csv":
            rows = csv_rows.iter_rows(shard, max_row_bytes, meter)
            yield from _regroup_by_range(shard, rows, ranges, meter)
        elif shard.codec or is_json_file(shard):
            rows = _json_rows(shard, _json_items(shard, max_row_bytes, meter))
            yield from _regroup_by_range(shard, rows, ranges, meter)
        else:
            for group in line_ranges.join_ranges(shard, ranges):
                content = line_ranges.read_group(shard, group, max_row_bytes)
                for part in group:
                    rows = _json_rows(shard, content.lines(part), part.start)
                    yield part, _collect(shard, rows, part, meter)


@contextmanager
def _decoding(shard: Shard) -> Iterator[None]:
    """Turn the errors of the CSV reader or the decompressor into one `DataError`."""
    try:
        yield
    except DistFtError:
        raise  # says already what is wrong; a StorageError must stay retryable
    except csv.Error as error:
        raise DataError(
            redact(
                f"{printable_line(shard.url)}: is not valid CSV ({error}). Write the shard again."
            )
        ) from error
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise DataError(
            redact(
                f"{printable_line(shard.url)}: is truncated or not {shard.codec or shard.kind} "
                f"({error}). Write the shard again."
            )
        ) from error


def _regroup_by_range(
    shard: Shard, rows: Iterator[Any], ranges: Sequence[ShardRange], meter: ByteMeter
) -> Iterator[tuple[ShardRange, list[Any]]]:
    """Yield (range, its rows [start, stop)) of all rows of a shard in order."""
    position = 0
    for part in ranges:
        # rows between two requested ranges have to be decoded, but need not be kept
        for _ in itertools.islice(rows, part.start - position):
            pass

        num_rows = None
        if part.stop != END_OF_SHARD:
            num_rows = part.stop - part.start
        part_rows = _collect(shard, itertools.islice(rows, num_rows), part, meter)

        position = part.start + len(part_rows)
        yield part, part_rows


def _collect(shard: Shard, rows: Iterator[Any], part: ShardRange, meter: ByteMeter) -> list[Any]:
    """Return the rows of a range.

    Raises:
        DataError: they take far more memory than the size of the shard lets expect.
    """
    first_byte = meter.num_bytes
    max_bytes = max(MAX_EXPANSION * part.num_bytes, MIN_EXPANDED_BYTES)
    collected: list[Any] = []
    bad_rows: list[DataError] = []

    for row in rows:
        collected.append(row)
        if isinstance(row, DataError):
            bad_rows.append(row)

        if meter.num_bytes - first_byte > max_bytes:
            raise DataError(
                redact(
                    f"{printable_line(shard.url)}: expands to more than {max_bytes / 2**20:,.0f} "
                    "MiB in one block, far more than its size lets expect. Write it again as "
                    "several shards, or without compression."
                )
            )
        if len(bad_rows) > MAX_BAD_ROWS:
            raise DataError(
                f"{printable_line(redact(shard.url))}: more than {MAX_BAD_ROWS:,} rows of one "
                f"block cannot be used; the first: {bad_rows[0]}"
            )

    return collected


def _text_row(shard: Shard) -> Row | DataError:
    """Return the one row of a plain-text shard."""
    if shard.size > MAX_TEXT_BYTES:
        return DataError(
            redact(
                f"{printable_line(shard.url)}: is larger than {MAX_TEXT_BYTES / 2**30:g} GiB. A "
                "text file is one row. Split it, or write JSON Lines."
            )
        )
    try:
        return {"text": open_shard(shard).read().decode("utf-8-sig")}
    except UnicodeDecodeError as error:
        return DataError(
            redact(
                f"{printable_line(shard.url)}: byte {error.start} is not UTF-8. Shards must be "
                "UTF-8. Convert the shard."
            )
        )


def _json_items(shard: Shard, max_row_bytes: int, meter: ByteMeter) -> Iterator[Any]:
    """Yield the lines of a whole shard, or the items of a .json file that is one array."""
    chunks = iter_chunks(open_shard(shard))
    # blank lines do not count, so what is dropped here has no number
    first_chunk = next(chunks, b"").removeprefix(_UTF8_BOM)
    while not first_chunk.strip() and (next_chunk := next(chunks, b"")):
        first_chunk = next_chunk
    chunks = itertools.chain([first_chunk], chunks)

    # an array may span lines, so its first character decides, not the first line
    if is_json_file(shard) and first_chunk.lstrip().startswith(b"["):
        yield from _array_items(shard, chunks)
    else:
        yield from iter_lines(chunks, shard.url, max_row_bytes, meter)


def _array_items(shard: Shard, chunks: Iterator[bytes]) -> list[Any]:
    """Return the items of a .json file that is one array, which is read as a whole."""
    max_bytes = MAX_TEXT_BYTES
    if shard.codec:
        max_bytes = max(MIN_EXPANDED_BYTES, MAX_EXPANSION * shard.size)

    content = bytearray()
    for chunk in chunks:
        content += chunk
        if len(content) > max_bytes:
            raise DataError(
                redact(
                    f"{printable_line(shard.url)}: is an array of more than "
                    f"{max_bytes / 2**20:,.0f} MiB. One object per line (.jsonl) may be of any "
                    "size. Convert it."
                )
            )

    try:
        items: list[Any] = decode_json(bytes(content))
    except ValueError as error:
        raise DataError(
            redact(
                f"{printable_line(shard.url)}: is not a JSON array ({error}). One object per line "
                "(.jsonl) is also allowed. Repair the file."
            )
        ) from error
    return items


def _json_rows(
    shard: Shard, items: Iterator[Any], first_byte: int = 0
) -> Iterator[Row | DataError]:
    """Yield the rows of lines (bytes) or of decoded items; blank lines do not count.

    Args:
        shard: the shard; errors name it.
        items: lines or decoded items, in order.
        first_byte: where the first line starts in the shard; rows before it are counted for errors
            only.
    """
    number = 0
    for item in items:
        if isinstance(item, bytes) and not item.strip():
            continue
        number += 1

        # Problems are yielded and not raised: the rows after a bad one are still read.
        if isinstance(item, LongLine):
            yield _line_error(shard, number, first_byte, item.problem())
            continue

        try:
            row = item
            if isinstance(item, bytes):
                row = decode_json(item)
        except UnicodeDecodeError as error:
            problem = f"byte {error.start} of the line is not UTF-8. Convert the shard."
            yield _line_error(shard, number, first_byte, problem)
            continue
        except ValueError as error:
            problem = (
                f"is not JSON ({error}). Each line must be one object. Repair or remove the line."
            )
            yield _line_error(shard, number, first_byte, problem)
            continue

        if not isinstance(row, dict):
            problem = (
                f"is a {type(row).__name__}. It must be an object with named fields. Repair or "
                "remove the line."
            )
            yield _line_error(shard, number, first_byte, problem)
            continue

        yield row


def _line_error(shard: Shard, number: int, first_byte: int, problem: str) -> DataError:
    """Return the error for line `number`, counted from the line at `first_byte`."""
    row = number + count_rows_before(shard, first_byte)
    return RowLocation(shard.url, row).error(problem)


@lru_cache(maxsize=16)
def count_rows_before(shard: Shard, byte: int) -> int:
    """Return how many rows of a plain .jsonl shard start before `byte`.

    For errors only: reads everything before `byte`. Cached, because each bad row of a range needs
    it.
    """
    # A line may span chunks, so whether it is blank is carried from one to the next.
    count = 0
    is_blank = True
    for chunk in ranged_reads.stream_range(shard.url, 0, byte):
        for index, line in enumerate(chunk.split(b"\n")):
            if index:  # the previous line ended here
                count += not is_blank
                is_blank = True
            is_blank = is_blank and not line.strip()

    # a line that `byte` cuts starts before it
    return count + (not is_blank)
