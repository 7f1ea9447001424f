"""Lines of byte ranges of plain JSON Lines; ranges that touch each other are read in one piece.

A line belongs to the range that it starts in, so ranges need not end at line breaks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from dist_ft.data.block import END_OF_SHARD, ShardRange
from dist_ft.data.sources import ranged_reads
from dist_ft.data.sources.discovery import Shard
from dist_ft.data.sources.line_reader import LongLine

MAX_JOINED_BYTES = 16 * 2**20
"""Ranges are joined up to this size, which is in memory."""
MARGIN_BYTES = 16 * 2**10
"""Bytes read after a range, in which its last line usually ends: one request less."""
_UTF8_BOM = b"\xef\xbb\xbf"


class RangeLines:
    """The content of consecutive ranges of a shard."""

    def __init__(self, shard: Shard, start: int, stop: int, max_row_bytes: int) -> None:
        """Read the bytes [start, stop); a line of more than `max_row_bytes` cannot be used."""
        self._shard = shard
        self._max_row_bytes = max_row_bytes
        # the byte before shows whether a line starts at `start`
        self._first_byte = max(0, start - 1)
        last = min(shard.size, stop + MARGIN_BYTES) if stop < shard.size else stop
        self._content = ranged_reads.read_range(shard.url, self._first_byte, last)

    def lines(self, part: ShardRange) -> Iterator[bytes | LongLine]:
        """Yield the lines that start in a range."""
        content = self._content
        start = part.start - self._first_byte  # both within `content`
        stop = _stop(self._shard, part) - self._first_byte

        if part.start:
            line_break = content.find(b"\n", start - 1)
            if line_break < 0:
                return  # one line, which starts before the range and ends after the content
            start = line_break + 1
        elif content.startswith(_UTF8_BOM):
            start = len(_UTF8_BOM)
        if start >= stop:
            return

        # The last line may end in a later range, which skips the rest of it.
        line_break = content.find(b"\n", stop - 1)
        if line_break >= 0:
            body = content[start:line_break]
        else:
            num_bytes = len(content) - max(start, content.rfind(b"\n") + 1)
            stop_byte = self._first_byte + len(content)
            body = content[start:] + _rest_of_line(
                self._shard, stop_byte, self._max_row_bytes - num_bytes
            )

        for line in body.split(b"\n"):
            if len(line) > self._max_row_bytes:
                yield LongLine(len(line), self._max_row_bytes)
            else:
                yield line


def join_ranges(shard: Shard, ranges: Sequence[ShardRange]) -> Iterator[list[ShardRange]]:
    """Yield the ranges in groups that are read in one piece, each starting where one ends."""
    group: list[ShardRange] = []
    for part in ranges:
        if group:
            touches = _stop(shard, group[-1]) == part.start
            num_bytes = _stop(shard, part) - group[0].start
            if not touches or num_bytes > MAX_JOINED_BYTES:
                yield group
                group = []
        group.append(part)

    if group:
        yield group


def read_group(shard: Shard, group: Sequence[ShardRange], max_row_bytes: int) -> RangeLines:
    """Read the ranges of a group of `join_ranges`."""
    return RangeLines(shard, group[0].start, _stop(shard, group[-1]), max_row_bytes)


def _stop(shard: Shard, part: ShardRange) -> int:
    return shard.size if part.stop == END_OF_SHARD else part.stop


def _rest_of_line(shard: Shard, start: int, max_bytes: int) -> bytes:
    """Return the bytes from `start` up to the next line break, or to the end.

    Of more than `max_bytes`, some more than those: the line is too long to be used.
    """
    # Most lines end soon: start with small reads and double them.
    rest = bytearray()
    width = ranged_reads.MIN_RANGE_BYTES
    while start < shard.size and len(rest) <= max_bytes:
        chunk = ranged_reads.read_range(shard.url, start, min(shard.size, start + width))
        line_break = chunk.find(b"\n")
        if line_break >= 0:
            rest += chunk[:line_break]
            break

        rest += chunk
        start += len(chunk)
        width = min(2 * width, ranged_reads.RANGE_BYTES)

    return bytes(rest)
