"""Lines within bounds: what is too long stands in its place, and memory does not grow with it."""

from __future__ import annotations

import gzip
import io
import random
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from dist_ft.core.errors import DataError
from dist_ft.data.block import ShardRange
from dist_ft.data.sources import csv_rows, line_reader, lines, readers
from dist_ft.data.sources.discovery import Shard
from dist_ft.data.sources.line_reader import ByteMeter, LongLine, iter_chunks, iter_lines

MIB = 2**20


def split(content: bytes, chunk: int, max_bytes: int) -> list[bytes | LongLine]:
    chunks = (content[start : start + chunk] for start in range(0, len(content), chunk))
    return list(iter_lines(chunks, "a.jsonl", max_bytes, ByteMeter()))


def expected(content: bytes, max_bytes: int) -> list[bytes | LongLine]:
    """The lines as Python splits them, without a bound of memory."""
    found: list[bytes | LongLine] = []
    for line in io.BytesIO(content):
        length = len(line.removesuffix(b"\n"))
        found.append(line if length <= max_bytes else LongLine(length, max_bytes))
    return found


def test_lines_are_those_of_the_file_whatever_the_chunks() -> None:
    numbers = random.Random(0)
    for _ in range(500):
        content = bytes(numbers.choices(b"a\n\r", [5, 2, 1], k=numbers.randrange(60)))
        for max_bytes in (0, 1, 3, 100):
            for chunk in (1, 2, 7, 100):
                assert split(content, chunk, max_bytes) == expected(content, max_bytes)


def test_the_meter_counts_every_byte() -> None:
    meter = ByteMeter()
    content = b"a\nbbbb\n\nccc"
    list(iter_lines(iter([content[:3], content[3:]]), "a.jsonl", 4, meter))
    assert meter.num_bytes == len(content)

    # What is skipped is never in memory, and does not count.
    meter = ByteMeter()
    list(iter_lines(iter([content[:3], content[3:]]), "a.jsonl", 2, meter))
    assert meter.num_bytes == len(b"a\n" + b"\n" + b"\n")


def zeros(num_bytes: int) -> Iterator[bytes]:
    for _ in range(num_bytes // MIB):
        yield bytes(MIB)


def test_memory_does_not_grow_with_a_line() -> None:
    tracemalloc.start()
    found = list(iter_lines(zeros(200 * MIB), "a.jsonl", 2 * MIB, ByteMeter()))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert found == [LongLine(200 * MIB, 2 * MIB)]
    assert peak < 10 * MIB


def test_a_line_without_end_ends_the_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(line_reader, "MAX_SKIPPED_BYTES", 10 * MIB)

    def chunks() -> Iterator[bytes]:
        yield b"a\n"
        while True:
            yield bytes(MIB)

    with pytest.raises(DataError, match=r"a.jsonl: the line at byte 2 .* does not end within"):
        list(iter_lines(chunks(), "a.jsonl", MIB, ByteMeter()))


def shard(path: Path, kind: str = "jsonl") -> Shard:
    return Shard(str(path), kind, path.stat().st_size, "1")  # type: ignore[arg-type]


ROWS = b'{"text": "%s"}\n'


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "json", "json.gz"])
@pytest.mark.parametrize("block_bytes", [200, 16 * MIB])
def test_a_long_row_is_one_bad_row_among_good_ones(
    suffix: str, block_bytes: int, tmp_path: Path
) -> None:
    content = ROWS % b"first" + ROWS % (b"x" * 5000) + ROWS % b"third"
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(gzip.compress(content) if suffix.endswith(".gz") else content)

    rows = list(readers.iter_rows(shard(path), block_bytes, max_row_bytes=1000))
    assert rows[0] == {"text": "first"} and rows[2] == {"text": "third"}
    assert isinstance(rows[1], DataError)
    assert str(rows[1]).startswith(f"{path} row 2: is longer than ")
    assert "data.max_row_mib" in str(rows[1])
    assert len(rows) == 3


def test_a_long_last_row_of_a_range_is_not_read_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with open(path, "wb") as file:
        file.write(ROWS % b"first")
        file.truncate(2**38)  # a sparse file: one line of a quarter of a TiB

    part = ShardRange(0, 0, 1000, 1000)
    ((_, rows),) = lines.read_ranges(shard(path), [part], MIB)
    assert rows[0] == {"text": "first"}
    assert "is longer than 1 MiB" in str(rows[1]) and len(rows) == 2


def test_a_small_archive_that_expands_far_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bomb.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(400):
            file.write((ROWS % (b"x" * 1000)) * 1024)

    assert path.stat().st_size < 4 * MIB  # one range, as it is small
    with pytest.raises(DataError, match=r"bomb.jsonl.gz: expands to more than 256 MiB"):
        list(readers.iter_rows(shard(path)))

    # With smaller blocks it is split by its rows, and so can be read.
    rows = readers.iter_rows(shard(path), block_bytes=MIB)
    assert sum(1 for _ in rows) == 400 * 1024


def test_errors_of_rows_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "MAX_BAD_ROWS", 100)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"1\n" * 5000)
    with pytest.raises(DataError, match=r"more than 100 rows of one block .* the first: .* row 1:"):
        list(readers.iter_rows(shard(path)))


def test_an_array_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "MAX_TEXT_BYTES", MIB)
    path = tmp_path / "a.json"
    path.write_bytes(b"\n" * (3 * MIB) + b"[" + b'{"a": 1},' * 10 + b'{"a": 2}]')
    assert list(readers.iter_rows(shard(path)))[-1] == {"a": 2}

    path.write_bytes(b"[" + b'{"a": 1},' * 200_000 + b'{"a": 2}]')
    with pytest.raises(DataError, match="is an array of more than 1 MiB"):
        list(readers.iter_rows(shard(path)))


def test_a_text_file_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with open(path, "wb") as file:
        file.truncate(2**40)
    (row,) = readers.iter_rows(shard(path, "text"))
    assert "is larger than 1 GiB" in str(row)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"[" * 200, "is not JSON .nested more than 100 deep"),
        (b'{"a": 1, "a": 2}', "is not JSON .duplicate key 'a'"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not JSON .a number of thousands of digits"),
        (b'{"a": "\xff"}', "byte 7 of the line is not UTF-8"),
        (b'{"a": 1}{', "is not JSON .Extra data at column 9"),
        (b"NaN", "is a float"),
    ],
)
def test_a_row_that_is_no_object_is_named(line: bytes, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(ROWS % b"first" + line + b"\n" + ROWS % b"third")
    rows = list(readers.iter_rows(shard(path)))
    assert [isinstance(row, DataError) for row in rows] == [False, True, False]
    import re

    assert re.search(f"row 2: {problem}", str(rows[1])), str(rows[1])


def test_a_record_of_csv_is_bounded_over_its_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'text,label\n"' + b"line\n" * 1000 + b'",1\n')
    assert len(list(readers.iter_rows(shard(path, "csv")))) == 1

    with pytest.raises(DataError, match=r"a.csv line \d+: the row is longer than .*a quote may"):
        list(readers.iter_rows(shard(path, "csv"), max_row_bytes=2000))

    # Rows together may be longer.
    path.write_bytes(b"text,label\n" + b"line,1\n" * 1000)
    assert len(list(readers.iter_rows(shard(path, "csv"), max_row_bytes=2000))) == 1000


def test_a_header_that_names_a_column_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"text,label,text\na,1,b\n")
    with pytest.raises(DataError, match="names the column 'text' 2 times"):
        list(readers.iter_rows(shard(path, "csv")))

    # Columns without a name come from commas at the ends of lines.
    path.write_bytes(b"text,label,,\na,1,,\n")
    assert len(list(readers.iter_rows(shard(path, "csv")))) == 1
    assert csv_rows.MAX_FIELD_CHARACTERS > MIB


def test_chunks_are_small() -> None:
    assert max(map(len, iter_chunks(io.BytesIO(bytes(3 * MIB + 5))))) <= line_reader.CHUNK_BYTES
