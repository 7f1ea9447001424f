"""Tables of others: no footer, dictionary or offset makes a block of unbounded memory, or a crash."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from dist_ft.core.errors import DataError
from dist_ft.data.sources import readers, tables
from dist_ft.data.sources.discovery import Shard

MIB = 2**20


def write(path: Path, content: bytes) -> Shard:
    path.write_bytes(content)
    kind: Any = path.suffix[1:]
    return Shard(str(path), kind, len(content), str(hash(content)))


def parquet(table: pa.Table, **options: Any) -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(table, buffer, **options)
    return buffer.getvalue()


def arrow(table: pa.Table, **options: Any) -> bytes:
    buffer = io.BytesIO()
    with pa.ipc.new_file(buffer, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table)
    return buffer.getvalue()


def test_a_dictionary_that_expands_far_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "MIN_EXPANDED_BYTES", 64 * MIB)
    text = pa.array(["x" * (MIB // 4)]).dictionary_encode()
    table = pa.table({"text": pa.DictionaryArray.from_arrays([0] * 4000, text.dictionary)})
    shard = write(tmp_path / "bomb.parquet", parquet(table, compression="zstd"))

    assert shard.size < MIB  # and a gigabyte of text
    with pytest.raises(DataError, match=r"bomb.parquet: the rows from 1 on decode to more than"):
        list(readers.iter_rows(shard))


def test_rows_larger_than_a_row_may_be_are_refused(tmp_path: Path) -> None:
    table = pa.table({"text": ["x" * (4 * MIB)] * 2})
    shard = write(tmp_path / "a.parquet", parquet(table, use_dictionary=False))

    assert len(list(readers.iter_rows(shard))) == 2
    with pytest.raises(DataError, match=r"row group 0 has 2 rows of 4 MiB each.*data.max_row_mib"):
        list(readers.iter_rows(shard, max_row_bytes=MIB))


def test_a_footer_that_cannot_be_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = write(tmp_path / "a.parquet", parquet(pa.table({"text": ["a"] * 10})))
    for sizes in ([(2**60, 10)], [(10, -1)], [(-5, 10)]):
        with pytest.raises(DataError, match=r"a.parquet: is not valid Parquet \(row group 0"):
            tables._require_plausible(shard, sizes)


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_damage_is_one_line(suffix: str, tmp_path: Path) -> None:
    """Every byte of a file is altered once: each outcome is the rows or one error, and no crash."""
    table = pa.table({"text": ["some text", "more", None] * 3, "n": list(range(9))})
    content = bytearray(parquet(table) if suffix == "parquet" else arrow(table))

    refused = 0
    for position in range(0, len(content), 7):
        damaged = (
            bytes(content[:position]) + bytes([content[position] ^ 0xFF]) + content[position + 1 :]
        )
        shard = write(tmp_path / f"a.{suffix}", damaged)
        try:
            list(readers.iter_rows(shard))
        except DataError as error:
            refused += 1
            assert str(error).startswith(str(tmp_path)) and "\n" not in str(error)
    assert refused


def test_offsets_beyond_the_values_are_refused(tmp_path: Path) -> None:
    import struct

    # Offsets of 4 bytes, of which the last points far outside the buffer of values.
    sound = struct.pack("<4i", 0, 1, 2, 3)
    content = arrow(pa.table({"text": ["a", "b", "c"]}))
    assert content.count(sound) == 1
    damaged = content.replace(sound, struct.pack("<4i", 0, 1, 2, 2**30))
    shard = write(tmp_path / "a.arrow", damaged)
    with pytest.raises(DataError, match="is not valid Arrow"):
        list(readers.iter_rows(shard))


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_text_that_is_not_utf8_is_a_bad_row(suffix: str, tmp_path: Path) -> None:
    import struct

    # pyarrow writes what is called text without looking at it.
    offsets = pa.py_buffer(struct.pack("<4i", 0, 1, 3, 4))
    array = pa.Array.from_buffers(pa.string(), 3, [None, offsets, pa.py_buffer(b"a\xff\xfeb")])
    table = pa.table({"text": array})
    shard = write(tmp_path / f"a.{suffix}", arrow(table) if suffix == "arrow" else parquet(table))

    first, second, third = readers.iter_rows(shard)
    assert first == {"text": "a"} and third == {"text": "b"}
    assert isinstance(second, DataError)
    assert str(second).startswith(f"{shard.url} row 2: has text that is not UTF-8")


def test_rows_without_values_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "MIN_EXPANDED_BYTES", MIB)
    shard = write(tmp_path / "a.arrow", arrow(pa.table({"nothing": pa.nulls(10**9)})))
    assert shard.size < 10_000
    with pytest.raises(DataError, match="decode to more than"):
        list(readers.iter_rows(shard))
