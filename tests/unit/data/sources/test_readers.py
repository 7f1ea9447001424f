"""Reading: wherever a shard is cut, all its rows come once and in order."""

import csv
import gzip
import hashlib
import io
import json
import weakref

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_ft.config.schema import Source
from dist_ft.core.errors import DataError
from dist_ft.data.block import END, Part, make_blocks
from dist_ft.data.sources import lines, ranged_reads, readers, tables
from dist_ft.data.sources.discovery import resolve
from dist_ft.storage.filesystem import Store

ROWS = [{"text": f"row {i} " + "é" * (i * 7 % 50), "n": str(i)} for i in range(200)]


def jsonl(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def as_csv(rows):
    found = io.StringIO()
    writer = csv.DictWriter(found, ["text", "n"])
    writer.writeheader()
    writer.writerows(rows)
    return found.getvalue().encode()


def parquet(rows, **values):
    found = io.BytesIO()
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), found, **values)
    return found.getvalue()


def arrow(rows, open_writer, size=13):
    found, table = io.BytesIO(), pa.Table.from_pylist(rows)
    with open_writer(found, table.schema) as writer:
        writer.write_table(table, max_chunksize=size)
    return found.getvalue()


def zstd(content):
    found = pa.BufferOutputStream()
    with pa.CompressedOutputStream(found, "zstd") as stream:
        stream.write(content)
    return found.getvalue().to_pybytes()


FILES = {
    "a.jsonl": jsonl(ROWS),
    "b.jsonl.gz": gzip.compress(jsonl(ROWS)),
    "c.jsonl.zst": zstd(jsonl(ROWS)),
    "d.json": json.dumps(ROWS).encode(),
    "e.csv": as_csv(ROWS),
    "f.csv.gz": gzip.compress(as_csv(ROWS)),
    "g.parquet": parquet(ROWS, row_group_size=17),
    "h.parquet": parquet(ROWS),
    "i.arrow": arrow(ROWS, pa.ipc.new_file),
    "j.arrow": arrow(ROWS, pa.ipc.new_stream),
    "k.jsonl": jsonl(ROWS).rstrip(b"\n"),
    "l.jsonl": b"\xef\xbb\xbf\n\r\n" + jsonl(ROWS).replace(b"\n", b"\r\n\n"),
    "m.json.gz": gzip.compress(jsonl(ROWS)),
}


def shard_of(folder, name, content):
    Store(folder).write(name, content)
    ((shard,),) = resolve([Source(path=f"{folder}/{name}")])
    return shard


def rows_of(shard, parts):
    found = []
    for _, rows in readers.read(shard, parts):
        found.append(rows if isinstance(rows, list) else rows.to_pylist())
    return found


@pytest.mark.parametrize("block_bytes", [50, 1000, 5000, 10**6])
@pytest.mark.parametrize("name", FILES)
def test_all_rows_once_and_in_order_wherever_it_is_cut(tmp_path, name, block_bytes):
    shard = shard_of(str(tmp_path), name, FILES[name])
    parts = readers.survey(shard, 0, block_bytes)
    assert [row for rows in rows_of(shard, parts) for row in rows] == ROWS
    if block_bytes == 1000 and name != "d.json" and not name.startswith("m."):
        assert len(parts) > 3
    if not readers.is_sequential(shard):  # any part by itself
        for part in parts[::50]:
            before = parts[: parts.index(part)]
            start = sum(map(len, rows_of(shard, before)))
            (alone,) = rows_of(shard, [part])
            assert alone == ROWS[start : start + len(alone)]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.text(st.characters(blacklist_categories=["Cs"]), max_size=30), min_size=1, max_size=30
    ),
    st.integers(1, 200),
)
def test_lines_are_cut_anywhere(tmp_path_factory, texts, block_bytes):
    rows = [{"text": text} for text in texts]
    shard = shard_of(f"memory://cut-{id(texts)}", "a.jsonl", jsonl(rows))
    parts = readers.survey(shard, 0, block_bytes)
    assert [row for found in rows_of(shard, parts) for row in found] == rows
    for part in parts:
        assert lines.rows_before(shard, part.start) == sum(
            map(len, rows_of(shard, parts[: parts.index(part)]))
        )


def test_a_line_longer_than_many_blocks(tmp_path):
    rows = [{"text": "a"}, {"text": "x" * 300_000}, {"text": "b"}]
    shard = shard_of(str(tmp_path), "a.jsonl", jsonl(rows))
    parts = readers.survey(shard, 0, 1000)
    assert len(parts) > 100 and [row for found in rows_of(shard, parts) for row in found] == rows


def test_small_parts_are_put_together():
    parts = [Part(i, 0, END, size) for i, size in enumerate([3, 3, 3, 20, 1, 1])]
    blocks = make_blocks(0, parts, 7)
    assert [[part.shard for part in block.parts] for block in blocks] == [[0, 1], [2], [3], [4, 5]]
    assert make_blocks(0, [], 7) == []


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"text,n\na,1\nb\n", r"a.csv row 2: has another number of fields than the header"),
        (b"text,n\na,1\nb,2,3\n", r"a.csv row 2: has another number of fields than the header"),
    ],
)
def test_csv_rows_that_do_not_fit_the_header(tmp_path, content, what):
    shard = shard_of(str(tmp_path), "a.csv", content)
    (rows,) = rows_of(shard, readers.survey(shard, 0, 100))
    assert isinstance(rows[1], DataError)
    with pytest.raises(DataError, match=what):
        raise rows[1]


def test_wrong_encoding_of_a_csv_is_named(tmp_path):
    shard = shard_of(str(tmp_path), "a.csv", "text\né\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"a.csv line 2: byte 0 is not UTF-8; convert the shard"):
        rows_of(shard, readers.survey(shard, 0, 100))


def test_a_flipped_byte_in_parquet_is_caught_where_pages_have_checksums(tmp_path):
    content = bytearray(
        parquet(ROWS, write_page_checksum=True, compression="none", use_dictionary=False)
    )
    place = content.find(b"row 150 ")
    content[place] ^= 1
    shard = shard_of(str(tmp_path), "a.parquet", bytes(content))
    with pytest.raises(
        DataError, match=r"a.parquet: is not Parquet that can be read \(.*; write the shard again"
    ):
        rows_of(shard, readers.survey(shard, 0, 10**6))


@pytest.mark.parametrize("cut", [10, 100])
@pytest.mark.parametrize("name", ["b.jsonl.gz", "c.jsonl.zst", "g.parquet", "i.arrow"])
def test_a_cut_off_shard_is_named(tmp_path, name, cut):
    shard = shard_of(str(tmp_path), name, FILES[name][:-cut])
    with pytest.raises(DataError, match=rf"/{name}: is not "):
        rows_of(shard, readers.survey(shard, 0, 10**6))


def test_a_file_that_seeks(tmp_path):
    content = bytes(range(256)) * 100
    Store(str(tmp_path)).write("a.txt", content)
    file = io.BufferedReader(ranged_reads.RangeFile(f"{tmp_path}/a.txt", len(content)), 64)
    assert file.read(10) == content[:10]
    file.seek(-20, io.SEEK_END)
    assert file.read() == content[-20:] and file.read() == b""
    file.seek(1000)
    assert file.read(300) == content[1000:1300] and file.tell() == 1300


@pytest.fixture
def counted(monkeypatch):
    """A list that gets the number of bytes of each ranged read."""
    asked, fetch_range = [], ranged_reads.fetch
    monkeypatch.setattr(
        ranged_reads,
        "fetch",
        lambda store, name, start, stop: (
            asked.append(stop - start),
            fetch_range(store, name, start, stop),
        )[1],
    )
    return asked


def test_many_bad_lines_cost_one_look_at_what_lies_before(tmp_path, counted):
    lines.rows_before.cache_clear()
    content = jsonl(ROWS) + b"not json\n" * 50 + jsonl(ROWS)
    shard = shard_of(str(tmp_path), "a.jsonl", content)
    part = Part(0, len(jsonl(ROWS)), len(content), 0)
    (rows,) = rows_of(shard, [part])
    assert [f" row {201 + i}: is not JSON" in str(rows[i]) for i in range(51)] == [True] * 50 + [
        False
    ]
    assert sum(counted) < 2 * len(content) and len(counted) < 4


BIG = [{"text": hashlib.sha512(f"{i}".encode()).hexdigest() * 4} for i in range(20_000)]


def test_parts_of_one_row_group_are_read_in_one_pass(tmp_path, counted):
    shard = shard_of(
        str(tmp_path),
        "a.parquet",
        parquet(
            [*ROWS[:50], *BIG], compression="none", use_dictionary=False, row_group_size=30_000
        ),
    )
    parts = readers.survey(shard, 0, shard.size // 20)
    assert len(parts) > 15 and {part.group for part in parts} == {0}
    counted.clear()
    rows = rows_of(shard, parts)
    assert [row["text"] for found in rows for row in found] == [
        row["text"] for row in [*ROWS[:50], *BIG]
    ]
    assert sum(counted) < 1.1 * shard.size, "the group once, not once a part"
    counted.clear()
    assert rows_of(shard, parts[7:8]) == rows[7:8] and rows_of(shard, parts[-1:]) == rows[-1:]
    assert sum(counted) < 2.1 * shard.size, "a late part alone: the group once"
    assert rows_of(shard, parts[2:18:5]) == rows[2:18:5]


def test_row_groups_without_a_wanted_part_are_not_read(tmp_path, counted):
    shard = shard_of(
        str(tmp_path),
        "a.parquet",
        parquet(BIG, compression="none", use_dictionary=False, row_group_size=1000),
    )
    parts = readers.survey(shard, 0, 10 * shard.size // 20)
    parts = [Part(0, start, start + 1000, 0) for start in range(0, 20_000, 1000)]
    counted.clear()
    first, last = rows_of(shard, [parts[0], parts[15]])
    assert first == BIG[:1000] and last == BIG[15_000:16_000] and sum(counted) < 0.2 * shard.size


def test_a_late_part_of_an_arrow_file_does_not_hold_what_lies_before(monkeypatch):
    alive, most = [], []

    def batches():
        for number in range(100):
            batch = pa.RecordBatch.from_pylist([{"n": number}])
            alive.append(weakref.ref(batch))
            most.append(sum(one() is not None for one in alive))
            yield number, batch

    ((_, table),) = tables._by_parts(
        batches(), [Part(0, 95, 97, 0)], pa.schema([("n", pa.int64())])
    )
    assert table.to_pylist() == [{"n": 95}, {"n": 96}] and max(most) <= 4


@pytest.mark.parametrize("open_writer", [pa.ipc.new_file, pa.ipc.new_stream])
def test_an_arrow_file_without_a_batch_holds_no_row(tmp_path, open_writer):
    found = io.BytesIO()
    open_writer(found, pa.schema([("text", pa.string())])).close()
    shard = shard_of(str(tmp_path), "a.arrow", found.getvalue())
    assert rows_of(shard, readers.survey(shard, 0, 1000)) == [[]]


def test_a_long_field_of_a_csv_is_read(tmp_path):
    rows = [{"text": "x" * 200_000, "n": "1"}, {"text": "y", "n": "2"}]
    shard = shard_of(str(tmp_path), "a.csv", as_csv(rows))
    assert [
        row for found in rows_of(shard, readers.survey(shard, 0, 1000)) for row in found
    ] == rows


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("a.csv", b'text,n\n"a"b,1\n' * 100, "is not CSV that can be read"),
        ("a.jsonl.gz", gzip.compress(jsonl(ROWS))[:-30], "is not whole gzip"),
        ("a.jsonl.gz", gzip.compress(jsonl(ROWS))[:50] + b"\xff" * 2000, "is not whole gzip"),
    ],
)
def test_a_shard_that_can_not_be_decoded_is_named_by_the_survey_too(tmp_path, name, content, what):
    with pytest.raises(DataError, match=f"/{name}: {what}"):
        readers.survey(shard_of(str(tmp_path), name, content), 0, 100)


def test_a_number_of_too_many_digits_is_a_bad_row(tmp_path):
    content = b'{"a": 1}\n{"a": ' + b"9" * 5000 + b'}\n{"a": 3}\n'
    (rows,) = rows_of(
        shard := shard_of(str(tmp_path), "a.jsonl", content), readers.survey(shard, 0, 10**6)
    )
    assert rows[::2] == [
        {"a": 1},
        {"a": 3},
    ] and "a.jsonl row 2: is not JSON (Exceeds the limit" in str(rows[1])
