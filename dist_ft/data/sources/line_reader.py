"""Lines of a file within bounds of memory and time, whatever a small compressed file expands to.

A line longer than the limit of a row is skipped in pieces and stands as a `LongLine` in its place,
so that the rows after it keep their numbers. A line that does not end within `MAX_SKIPPED_BYTES`
ends the shard: to look for its end could take hours.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any, NamedTuple

from dist_ft.core.errors import DataError
from dist_ft.core.logs import redact
from dist_ft.core.printable import printable_line
from dist_ft.data.sources import ranged_reads
from dist_ft.data.sources.discovery import Shard

CHUNK_BYTES = 2**20
"""Bytes that are decompressed at a time."""
MAX_SKIPPED_BYTES = 2**30
"""Bytes of a line that is too long which are read to find its end; a few seconds."""
MAX_ROW_BYTES = 64 * 2**20
"""Bytes of a row, unless data.max_row_mib says otherwise."""


class LongLine(NamedTuple):
    """A line that is longer than a row may be.

    Attributes:
        num_bytes: its bytes; of a line whose end was not looked for, those that were read.
        max_bytes: the limit that it exceeds.
    """

    num_bytes: int
    max_bytes: int

    def problem(self) -> str:
        """Return what is wrong with the row, for `RowLocation.error`."""
        return (
            f"is longer than {self.max_bytes / 2**20:g} MiB. Split or remove the row, or raise "
            "data.max_row_mib."
        )


class ByteMeter:
    """Counts the bytes of the lines that were read from a shard, without what was skipped."""

    def __init__(self) -> None:
        self.num_bytes = 0


def open_shard(shard: Shard) -> Any:
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


def read_lines(shard: Shard, max_row_bytes: int, meter: ByteMeter) -> Iterator[bytes | LongLine]:
    """Yield the lines of a whole shard."""
    return iter_lines(iter_chunks(open_shard(shard)), shard.url, max_row_bytes, meter)


def iter_chunks(file: Any) -> Iterator[bytes]:
    """Yield the content of a file in pieces of `CHUNK_BYTES`."""
    while chunk := file.read(CHUNK_BYTES):
        yield chunk


def iter_lines(
    chunks: Iterator[bytes], url: str, max_bytes: int, meter: ByteMeter
) -> Iterator[bytes | LongLine]:
    """Yield the lines of a file, each with its line break.

    Args:
        chunks: content of the file in pieces.
        url: the shard, for errors.
        max_bytes: limit of a line, its line break not included.
        meter: is advanced by the bytes of each line that is not too long.

    Raises:
        DataError: a line does not end within `MAX_SKIPPED_BYTES`.
    """
    held: list[bytes] = []  # the line so far; empty if it is too long
    num_held = 0  # its bytes, kept or not
    position = 0  # where it starts

    for chunk in chunks:
        *complete, rest = chunk.split(b"\n")
        for part in complete:
            num_bytes = num_held + len(part)
            position += num_bytes + 1
            # What is skipped takes no memory, which is what the meter is for.
            is_long = num_bytes > max_bytes
            meter.num_bytes += 1 if is_long else num_bytes + 1

            if is_long:
                yield LongLine(num_bytes, max_bytes)
            elif held:
                yield b"".join([*held, part, b"\n"])
            else:
                yield part + b"\n"
            held, num_held = [], 0

        num_held += len(rest)
        if num_held > max_bytes:
            held = []
            _require_end_near(url, position, num_held)
        elif rest:
            held.append(rest)

    # the last line, if it has no line break
    if num_held > max_bytes:
        yield LongLine(num_held, max_bytes)
    elif num_held:
        meter.num_bytes += num_held
        yield b"".join(held)


def _require_end_near(url: str, start: int, num_bytes: int) -> None:
    """Raise DataError if a line, of which `num_bytes` were read, is longer than any may be."""
    if num_bytes > MAX_SKIPPED_BYTES:
        raise DataError(
            redact(
                f"{printable_line(url)}: the line at byte {start} (of the decompressed content) "
                f"does not end within {MAX_SKIPPED_BYTES / 2**30:g} GiB. Rows end with a line "
                "break. Write the shard again."
            )
        )
