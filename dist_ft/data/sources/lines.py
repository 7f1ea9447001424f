"""Rows of JSON lines, CSV and plain text, compressed or not, read as a stream."""

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
from dist_ft.data.block import END, Part, cut_range
from dist_ft.data.sources import ranged_reads
from dist_ft.data.sources.discovery import Row, Shard, row_error

LONGEST_FIELD = 2**31 - 1
"""Characters of a CSV field; the csv module's own limit is 131,072."""


def cuts(shard: Shard, number: int, block_bytes: int) -> list[Part]:
    """Return parts of a plain .jsonl shard: byte ranges. A .json file may be one array and is not cut."""
    if is_json_file(shard):
        return [Part(number, 0, END, shard.size)]
    return cut_range(number, shard.size, shard.size, block_bytes)


def is_json_file(shard: Shard) -> bool:
    """Tell whether the name says .json, which may be one array, and not .jsonl."""
    return ".json" in shard.url.lower() and ".jsonl" not in shard.url.lower()


def sizes(shard: Shard) -> Iterator[tuple[int, int]]:
    """Yield (1, bytes) for every row, in one pass."""
    with _decoding(shard):
        if shard.kind == "csv":
            csv.field_size_limit(LONGEST_FIELD)
            for row in csv.reader(_text(shard), strict=True):
                yield 1, sum(map(len, row))
        else:
            for line in _open(shard):
                if line.strip():
                    yield 1, len(line)


def read(shard: Shard, parts: Sequence[Part]) -> Iterator[tuple[Part, list[Row | DataError]]]:
    """Yield (part, rows) in one pass; see `readers.read`."""
    with _decoding(shard):
        if shard.kind == "text":
            yield parts[0], [_text_row(shard)]
        elif shard.kind == "csv":
            yield from _by_rows(_csv_rows(shard), parts)
        elif shard.codec or is_json_file(shard):
            yield from _by_rows(_json_rows(shard, _items(shard)), parts)
        else:
            for part in parts:
                yield part, list(_json_rows(shard, _lines_of(shard, part), part.start))


@contextmanager
def _decoding(shard: Shard) -> Iterator[None]:
    """Turn what the CSV reader or a decompressor says into one `DataError`."""
    try:
        yield
    except DistFtError:
        raise
    except csv.Error as error:
        raise DataError(
            redact(f"{shard.url}: is not CSV that can be read ({error}); write the shard again")
        ) from error
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise DataError(
            redact(
                f"{shard.url}: is not whole {shard.codec or shard.kind} ({error}); write the shard "
                "again"
            )
        ) from error


def _by_rows(rows: Iterator[Any], parts: Sequence[Part]) -> Iterator[tuple[Part, list[Any]]]:
    """Yield the rows [start, stop) of each part."""
    at = 0
    for part in parts:
        for _ in itertools.islice(rows, part.start - at):
            pass
        found = list(rows if part.stop == END else itertools.islice(rows, part.stop - part.start))
        at = part.start + len(found)
        yield part, found


def _open(shard: Shard) -> Any:
    """Return the decompressed bytes of a shard as a file."""
    import gzip

    raw = io.BufferedReader(ranged_reads.RangeFile(shard.url, shard.size), ranged_reads.RANGE_BYTES)
    if shard.codec == "gzip":
        return gzip.GzipFile(fileobj=raw)
    if shard.codec == "zstd":
        import pyarrow

        return io.BufferedReader(
            pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd"), 2**20
        )
    return raw


def _text(shard: Shard) -> Iterator[str]:
    """Yield the lines of a shard as text, for the CSV reader."""
    for number, line in enumerate(_open(shard)):
        try:
            yield line.decode("utf-8-sig" if number == 0 else "utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                redact(
                    f"{shard.url} line {number + 1}: byte {error.start} is not UTF-8; convert the "
                    "shard"
                )
            ) from error


def _csv_rows(shard: Shard) -> Iterator[Row | DataError]:
    csv.field_size_limit(LONGEST_FIELD)
    for number, row in enumerate(csv.DictReader(_text(shard), strict=True), 1):
        if None in row or None in row.values():
            yield row_error(
                shard.url,
                number,
                "has another number of fields than the header; repair or remove the row",
            )
        else:
            yield dict(row)


def _text_row(shard: Shard) -> Row | DataError:
    try:
        return {"text": _open(shard).read().decode("utf-8-sig")}
    except UnicodeDecodeError as error:
        return DataError(
            redact(
                f"{shard.url}: byte {error.start} is not UTF-8; shards must be UTF-8; convert it"
            )
        )


def _items(shard: Shard) -> Iterator[Any]:
    """Yield the lines of a shard that is read from its start, or the items of a .json file that is one array."""
    file = _open(shard)
    first = next((line for line in file if line.strip()), b"").removeprefix(b"\xef\xbb\xbf")
    if is_json_file(shard) and first.lstrip().startswith(b"["):
        try:
            yield from json.loads(first + file.read())
        except (ValueError, RecursionError) as error:
            raise DataError(
                redact(
                    f"{shard.url}: is not a JSON array ({error}); one object a line (.jsonl) is allowed "
                    "too; repair the file"
                )
            ) from error
        return
    yield first
    yield from file


def _lines_of(shard: Shard, part: Part) -> Iterator[bytes]:
    """Yield the lines that begin in the byte range of `part`."""
    stop = shard.size if part.stop == END else part.stop
    begin = max(0, part.start - 1)  # the byte before tells whether a line begins at `start`
    content = ranged_reads.read(shard.url, begin, stop)
    if part.start and (cut := content.find(b"\n")) < 0:
        return  # one line that began before and ends after
    content = content[cut + 1 :] if part.start else content.removeprefix(b"\xef\xbb\xbf")
    if content and not content.endswith(b"\n"):
        content += _rest_of_line(shard, stop)
    yield from content.split(b"\n")


def _rest_of_line(shard: Shard, start: int) -> bytes:
    """Return the bytes from `start` up to the next line break, or to the end."""
    found, width = bytearray(), ranged_reads.LEAST_BYTES
    while start < shard.size:
        more = ranged_reads.read(shard.url, start, min(shard.size, start + width))
        end = more.find(b"\n")
        found += more if end < 0 else more[:end]
        if end >= 0:
            break
        start, width = start + len(more), min(2 * width, ranged_reads.RANGE_BYTES)
    return bytes(found)


def _json_rows(
    shard: Shard, items: Iterator[Any], first_byte: int = 0
) -> Iterator[Row | DataError]:
    """Decode lines (bytes) or pass items on; blank lines do not count."""
    number = 0
    for item in items:
        if isinstance(item, bytes) and not item.strip():
            continue
        number += 1
        try:
            row = json.loads(item) if isinstance(item, bytes) else item
        except UnicodeDecodeError as error:
            yield _bad_line(
                shard,
                number,
                first_byte,
                f"byte {error.start} of the line is not UTF-8; convert the shard",
            )
            continue
        except (ValueError, RecursionError) as error:
            yield _bad_line(
                shard,
                number,
                first_byte,
                f"is not JSON ({_why(error)}); one object a line is needed; repair or remove the line",
            )
            continue
        if not isinstance(row, dict):
            yield _bad_line(
                shard,
                number,
                first_byte,
                f"is a {type(row).__name__}; an object with named fields is "
                "needed; repair or remove the line",
            )
            continue
        yield row


def _why(error: ValueError | RecursionError) -> str:
    """Return what `json.loads` has against a line; a whole number of thousands of digits is a plain ValueError."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return "too deep" if isinstance(error, RecursionError) else str(error)


def _bad_line(shard: Shard, number: int, first_byte: int, problem: str) -> DataError:
    return row_error(shard.url, number + rows_before(shard, first_byte), problem)


@lru_cache(maxsize=16)
def rows_before(shard: Shard, byte: int) -> int:
    """Return how many rows of a plain .jsonl shard begin before `byte`.

    For errors only, and asked for by each of a part's bad rows: reads all before it, once.
    """
    count, blank = 0, True
    for chunk in ranged_reads.stream(shard.url, 0, byte):
        for number, line in enumerate(chunk.split(b"\n")):
            if number:  # a line ended here
                count += not blank
                blank = True
            blank = blank and not line.strip()
    return count + (not blank)
