"""Read the rows of JSON Lines, CSV and plain text, compressed or not, as a stream."""

from __future__ import annotations

import csv
import io
import itertools
import json
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from dist_ft.core.errors import DataError, DistFtError
from dist_ft.core.logs import redact
from dist_ft.data.block import END_OF_SHARD, ShardRange, split_range
from dist_ft.data.sources import ranged_reads
from dist_ft.data.sources.discovery import Row, RowLocation, Shard

MAX_FIELD_CHARACTERS = 2**31 - 1
"""Characters of a CSV field; the default limit of the csv module is 131,072."""
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


def iter_row_sizes(shard: Shard) -> Iterator[tuple[int, int]]:
    """Yield (1, bytes) for every row, in one pass."""
    with _decoding(shard):
        if shard.kind == "csv":
            csv.field_size_limit(MAX_FIELD_CHARACTERS)
            for row in csv.reader(_text_lines(shard), strict=True):
                yield 1, sum(map(len, row))
        else:
            # blank lines are no rows, here as in `_json_rows`: ranges are row numbers
            for line in _open(shard):
                if line.strip():
                    yield 1, len(line)


def read_ranges(
    shard: Shard, ranges: Sequence[ShardRange]
) -> Iterator[tuple[ShardRange, list[Row | DataError]]]:
    """Yield (range, its rows) in one pass; see `readers.read_ranges`."""
    with _decoding(shard):
        if shard.kind == "text":
            yield ranges[0], [_text_row(shard)]
        elif shard.kind == "csv":
            yield from _regroup_by_range(_csv_rows(shard), ranges)
        elif shard.codec or is_json_file(shard):
            yield from _regroup_by_range(_json_rows(shard, _json_items(shard)), ranges)
        else:
            for part in ranges:
                yield part, list(_json_rows(shard, _lines_of_range(shard, part), part.start))


@contextmanager
def _decoding(shard: Shard) -> Iterator[None]:
    """Turn the errors of the CSV reader or the decompressor into one `DataError`."""
    try:
        yield
    except DistFtError:
        raise  # says already what is wrong; a StorageError must stay retryable
    except csv.Error as error:
        raise DataError(
            redact(f"{shard.url}: is not valid CSV ({error}). Write the shard again.")
        ) from error
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise DataError(
            redact(
                f"{shard.url}: is truncated or not {shard.codec or shard.kind} ({error}). Write "
                "the shard again."
            )
        ) from error


def _regroup_by_range(
    rows: Iterator[Any], ranges: Sequence[ShardRange]
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
        part_rows = list(itertools.islice(rows, num_rows))

        position = part.start + len(part_rows)
        yield part, part_rows


def _open(shard: Shard) -> Any:
    """Return the decompressed bytes of a shard as a file."""
    import gzip

    raw = io.BufferedReader(
        ranged_reads.ReadAheadFile(shard.url, shard.size), ranged_reads.RANGE_BYTES
    )
    if shard.codec == "gzip":
        return gzip.GzipFile(fileobj=raw)

    if shard.codec == "zstd":
        import pyarrow

        # the standard library cannot read it; buffered, as pyarrow's stream has no lines
        stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd")
        return io.BufferedReader(stream, 2**20)

    return raw


def _text_lines(shard: Shard) -> Iterator[str]:
    """Yield the lines of a shard as text, for the CSV reader."""
    # Decoded line by line, so that an error can name the line. A BOM is allowed in the first.
    encoding = "utf-8-sig"
    for index, line in enumerate(_open(shard)):
        try:
            yield line.decode(encoding)
        except UnicodeDecodeError as error:
            raise DataError(
                redact(
                    f"{shard.url} line {index + 1}: byte {error.start} is not UTF-8. Convert the "
                    "shard."
                )
            ) from error
        encoding = "utf-8"


def _csv_rows(shard: Shard) -> Iterator[Row | DataError]:
    """Yield the rows of a CSV shard."""
    csv.field_size_limit(MAX_FIELD_CHARACTERS)
    for number, row in enumerate(csv.DictReader(_text_lines(shard), strict=True), 1):
        # DictReader's marks: key None for fields too many, value None for fields too few
        if None in row or None in row.values():
            yield RowLocation(shard.url, number).error(
                "does not have as many fields as the header. Repair or remove the row."
            )
        else:
            yield dict(row)


def _text_row(shard: Shard) -> Row | DataError:
    """Return the one row of a plain-text shard."""
    try:
        return {"text": _open(shard).read().decode("utf-8-sig")}
    except UnicodeDecodeError as error:
        return DataError(
            redact(
                f"{shard.url}: byte {error.start} is not UTF-8. Shards must be UTF-8. Convert the "
                "shard."
            )
        )


def _json_items(shard: Shard) -> Iterator[Any]:
    """Yield the lines of a whole shard, or the items of a .json file that is one array."""
    file = _open(shard)
    first_line = next((line for line in file if line.strip()), b"").removeprefix(_UTF8_BOM)

    # an array may span lines, so its first character decides, not the first line
    if is_json_file(shard) and first_line.lstrip().startswith(b"["):
        try:
            yield from json.loads(first_line + file.read())
        except (ValueError, RecursionError) as error:
            raise DataError(
                redact(
                    f"{shard.url}: is not a JSON array ({error}). One object per line (.jsonl) is "
                    "also allowed. Repair the file."
                )
            ) from error

        return

    yield first_line
    yield from file


def _lines_of_range(shard: Shard, part: ShardRange) -> Iterator[bytes]:
    """Yield the lines that start in the byte range of `part`."""
    stop = shard.size if part.stop == END_OF_SHARD else part.stop
    read_start = max(0, part.start - 1)  # the byte before shows whether a line starts at `start`
    content = ranged_reads.read_range(shard.url, read_start, stop)

    if part.start:
        line_break = content.find(b"\n")
        if line_break < 0:
            return  # one line, which starts before the range and ends after it
        content = content[line_break + 1 :]
    else:
        content = content.removeprefix(_UTF8_BOM)

    # the last line ends in a later range, which skips the rest of it
    if content and not content.endswith(b"\n"):
        content += _rest_of_line(shard, stop)
    yield from content.split(b"\n")


def _rest_of_line(shard: Shard, start: int) -> bytes:
    """Return the bytes from `start` up to the next line break, or to the end."""
    # Most lines end soon: start with small reads and double them.
    rest = bytearray()
    width = ranged_reads.MIN_RANGE_BYTES
    while start < shard.size:
        chunk = ranged_reads.read_range(shard.url, start, min(shard.size, start + width))
        line_break = chunk.find(b"\n")
        if line_break >= 0:
            rest += chunk[:line_break]
            break

        rest += chunk
        start += len(chunk)
        width = min(2 * width, ranged_reads.RANGE_BYTES)

    return bytes(rest)


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
        try:
            row = item
            if isinstance(item, bytes):
                row = json.loads(item)
        except UnicodeDecodeError as error:
            problem = f"byte {error.start} of the line is not UTF-8. Convert the shard."
            yield _line_error(shard, number, first_byte, problem)
            continue
        except (ValueError, RecursionError) as error:
            problem = (
                f"is not JSON ({_json_problem(error)}). Each line must be one object. Repair or "
                "remove the line."
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


def _json_problem(error: ValueError | RecursionError) -> str:
    """Return why `json.loads` refused a line.

    An integer of thousands of digits is a plain ValueError.
    """
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return str(error)


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
