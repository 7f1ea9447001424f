"""Rows of a CSV shard. A record may span lines, so its size is bounded over all of them."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator, Sequence

from dist_ft.core.errors import DataError
from dist_ft.core.logs import redact
from dist_ft.core.printable import printable_line
from dist_ft.data.sources.discovery import Row, RowLocation, Shard
from dist_ft.data.sources.line_reader import ByteMeter, LongLine, read_lines

MAX_FIELD_CHARACTERS = 2**31 - 1
"""Characters of a field. The limit of a row is lower; that of the csv module is 131,072."""


def iter_rows(shard: Shard, max_row_bytes: int, meter: ByteMeter) -> Iterator[Row | DataError]:
    """Yield the rows of a CSV shard."""
    csv.field_size_limit(MAX_FIELD_CHARACTERS)
    lines = _TextLines(shard, max_row_bytes, meter)
    reader = csv.DictReader(lines, strict=True)
    _require_distinct(shard, reader.fieldnames or ())

    for number, row in enumerate(reader, 1):
        lines.end_record()
        # DictReader's marks: key None for fields too many, value None for fields too few
        if None in row or None in row.values():
            yield RowLocation(shard.url, number).error(
                "does not have as many fields as the header. Repair or remove the row."
            )
        else:
            yield dict(row)


def _require_distinct(shard: Shard, names: Sequence[str]) -> None:
    """Refuse a header that names a column twice: the first would be ignored silently."""
    for name, count in Counter(names).items():
        # Columns without a name are those of trailing commas.
        if name and count > 1:
            raise DataError(
                redact(
                    f"{printable_line(shard.url)}: the header names the column "
                    f"'{printable_line(name)}' {count} times. Each name is allowed once. Rename or "
                    "remove the others."
                )
            )


def iter_row_sizes(shard: Shard, max_row_bytes: int) -> Iterator[tuple[int, int]]:
    """Yield (1, characters) for every row, in one pass."""
    csv.field_size_limit(MAX_FIELD_CHARACTERS)
    lines = _TextLines(shard, max_row_bytes, ByteMeter())
    for row in csv.reader(lines, strict=True):
        lines.end_record()
        yield 1, sum(map(len, row))


class _TextLines:
    """The lines of a shard as text, for the CSV reader; a record may span several of them."""

    def __init__(self, shard: Shard, max_row_bytes: int, meter: ByteMeter) -> None:
        self._shard = shard
        self._max_row_bytes = max_row_bytes
        self._lines = read_lines(shard, max_row_bytes, meter)
        self._number = 0
        self._record_bytes = 0

    def __iter__(self) -> _TextLines:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self._number += 1

        # Not one row that could be skipped: where the next one starts depends on its quotes.
        self._record_bytes += self._max_row_bytes + 1 if isinstance(line, LongLine) else len(line)
        if isinstance(line, LongLine) or self._record_bytes > self._max_row_bytes:
            raise self._error(
                f"the row is longer than {self._max_row_bytes / 2**20:g} MiB; a quote may be "
                "missing. Repair it, or raise data.max_row_mib."
            )

        # Decoded line by line, so that an error can name the line. A BOM is allowed in the first.
        try:
            return line.decode("utf-8-sig" if self._number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise self._error(f"byte {error.start} is not UTF-8. Convert the shard.") from error

    def end_record(self) -> None:
        """Start counting anew: the reader has returned a row."""
        self._record_bytes = 0

    def _error(self, problem: str) -> DataError:
        return DataError(
            redact(f"{printable_line(self._shard.url)} line {self._number}: {problem}")
        )
