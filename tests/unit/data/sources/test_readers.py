"""Reading: wherever a shard is split, each of its rows is read once and in order."""

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
from dist_ft.data.block import END_OF_SHARD, ShardRange, group_into_blocks
from dist_ft.data.sources import lines, ranged_reads, readers, tables
from dist_ft.data.sources.discovery import Shard, discover_shards
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
    ((shard,),) = discover_shards([Source(path=f"{folder}/{name}")])
    return shard


def read_rows(shard, ranges):
    found = []
    for _, rows in readers.read_ranges(shard, ranges):
        found.append(rows if isinstance(rows, list) else rows.to_pylist())
    return found


@pytest.mark.parametrize("block_bytes", [50, 1000, 5000, 10**6])
@pytest.mark.parametrize("name", FILES)
def test_every_row_is_read_once_and_in_order_wherever_split(tmp_path, name, block_bytes):
    shard = shard_of(str(tmp_path), name, FILES[name])
    ranges = readers.split_into_ranges(shard, 0, block_bytes)
    assert [row for rows in read_rows(shard, ranges) for row in rows] == ROWS
    if block_bytes == 1000 and name != "d.json" and not name.startswith("m."):
        assert len(ranges) > 3
    if not readers.is_sequential(shard):  # any range by itself
        for part in ranges[::50]:
            before = ranges[: ranges.index(part)]
            start = sum(map(len, read_rows(shard, before)))
            (alone,) = read_rows(shard, [part])
            assert alone == ROWS[start : start + len(alone)]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.text(st.characters(blacklist_categories=["Cs"]), max_size=30), min_size=1, max_size=30
    ),
    st.integers(1, 200),
)
def test_lines_can_be_split_anywhere(tmp_path_factory, texts, block_bytes):
    rows = [{"text": text} for text in texts]
    shard = shard_of(f"memory://cut-{id(texts)}", "a.jsonl", jsonl(rows))
    ranges = readers.split_into_ranges(shard, 0, block_bytes)
    assert [row for found in read_rows(shard, ranges) for row in found] == rows
    for part in ranges:
        assert lines.count_rows_before(shard, part.start) == sum(
            map(len, read_rows(shard, ranges[: ranges.index(part)]))
        )


def test_line_longer_than_many_blocks_is_read_once(tmp_path):
    rows = [{"text": "a"}, {"text": "x" * 300_000}, {"text": "b"}]
    shard = shard_of(str(tmp_path), "a.jsonl", jsonl(rows))
    ranges = readers.split_into_ranges(shard, 0, 1000)
    assert (
        len(ranges) > 100 and [row for found in read_rows(shard, ranges) for row in found] == rows
    )


def test_small_ranges_are_grouped_into_blocks():
    ranges = [ShardRange(i, 0, END_OF_SHARD, size) for i, size in enumerate([3, 3, 3, 20, 1, 1])]
    blocks = group_into_blocks(0, ranges, 7)
    assert [[part.shard for part in block.ranges] for block in blocks] == [[0, 1], [2], [3], [4, 5]]
    assert group_into_blocks(0, [], 7) == []


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"text,n\na,1\nb\n", r"a.csv row 2: does not have as many fields as the header"),
        (b"text,n\na,1\nb,2,3\n", r"a.csv row 2: does not have as many fields as the header"),
    ],
)
def test_csv_rows_that_do_not_match_the_header_are_refused(tmp_path, content, problem):
    shard = shard_of(str(tmp_path), "a.csv", content)
    (rows,) = read_rows(shard, readers.split_into_ranges(shard, 0, 100))
    assert isinstance(rows[1], DataError)
    with pytest.raises(DataError, match=problem):
        raise rows[1]


def test_error_of_wrongly_encoded_csv_names_the_line(tmp_path):
    shard = shard_of(str(tmp_path), "a.csv", "text\né\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"a.csv line 2: byte 0 is not UTF-8. Convert the shard"):
        read_rows(shard, readers.split_into_ranges(shard, 0, 100))


def test_flipped_byte_in_parquet_with_page_checksums_is_detected(tmp_path):
    content = bytearray(
        parquet(ROWS, write_page_checksum=True, compression="none", use_dictionary=False)
    )
    place = content.find(b"row 150 ")
    content[place] ^= 1
    shard = shard_of(str(tmp_path), "a.parquet", bytes(content))
    with pytest.raises(
        DataError, match=r"a.parquet: is not valid Parquet \(.*. Write the shard again"
    ):
        read_rows(shard, readers.split_into_ranges(shard, 0, 10**6))


@pytest.mark.parametrize("cut", [10, 100])
@pytest.mark.parametrize("name", ["b.jsonl.gz", "c.jsonl.zst", "g.parquet", "i.arrow"])
def test_error_of_truncated_shard_names_it(tmp_path, name, cut):
    shard = shard_of(str(tmp_path), name, FILES[name][:-cut])
    with pytest.raises(DataError, match=rf"/{name}: is (truncated or )?not "):
        read_rows(shard, readers.split_into_ranges(shard, 0, 10**6))


def test_read_ahead_file_can_seek(tmp_path):
    content = bytes(range(256)) * 100
    Store(str(tmp_path)).write("a.txt", content)
    file = io.BufferedReader(ranged_reads.ReadAheadFile(f"{tmp_path}/a.txt", len(content)), 64)
    assert file.read(10) == content[:10]
    file.seek(-20, io.SEEK_END)
    assert file.read() == content[-20:] and file.read() == b""
    file.seek(1000)
    assert file.read(300) == content[1000:1300] and file.tell() == 1300


@pytest.fixture
def counted(monkeypatch):
    """A list to which the number of bytes of each ranged read is appended."""
    read_sizes, fetch_range = [], ranged_reads.fetch_range
    monkeypatch.setattr(
        ranged_reads,
        "fetch_range",
        lambda store, name, start, stop: (
            read_sizes.append(stop - start),
            fetch_range(store, name, start, stop),
        )[1],
    )
    return read_sizes


def test_many_bad_lines_read_the_rows_before_once(tmp_path, counted):
    lines.count_rows_before.cache_clear()
    content = jsonl(ROWS) + b"not json\n" * 50 + jsonl(ROWS)
    shard = shard_of(str(tmp_path), "a.jsonl", content)
    part = ShardRange(0, len(jsonl(ROWS)), len(content), 0)
    (rows,) = read_rows(shard, [part])
    assert [f" row {201 + i}: is not JSON" in str(rows[i]) for i in range(51)] == [True] * 50 + [
        False
    ]
    assert sum(counted) < 2 * len(content) and len(counted) < 4


BIG = [{"text": hashlib.sha512(f"{i}".encode()).hexdigest() * 4} for i in range(20_000)]


def test_ranges_of_one_row_group_are_read_in_one_pass(tmp_path, counted):
    shard = shard_of(
        str(tmp_path),
        "a.parquet",
        parquet(
            [*ROWS[:50], *BIG], compression="none", use_dictionary=False, row_group_size=30_000
        ),
    )
    ranges = readers.split_into_ranges(shard, 0, shard.size // 20)
    assert len(ranges) > 15 and {part.group for part in ranges} == {0}
    counted.clear()
    rows = read_rows(shard, ranges)
    assert [row["text"] for found in rows for row in found] == [
        row["text"] for row in [*ROWS[:50], *BIG]
    ]
    assert sum(counted) < 1.1 * shard.size, "the group once, not once per range"
    counted.clear()
    assert read_rows(shard, ranges[7:8]) == rows[7:8] and read_rows(shard, ranges[-1:]) == rows[-1:]
    assert sum(counted) < 2.1 * shard.size, "a late range alone: the group once"
    assert read_rows(shard, ranges[2:18:5]) == rows[2:18:5]


def test_row_groups_without_a_requested_range_are_not_read(tmp_path, counted):
    shard = shard_of(
        str(tmp_path),
        "a.parquet",
        parquet(BIG, compression="none", use_dictionary=False, row_group_size=1000),
    )
    ranges = readers.split_into_ranges(shard, 0, 10 * shard.size // 20)
    ranges = [ShardRange(0, start, start + 1000, 0) for start in range(0, 20_000, 1000)]
    counted.clear()
    first, last = read_rows(shard, [ranges[0], ranges[15]])
    assert first == BIG[:1000] and last == BIG[15_000:16_000] and sum(counted) < 0.2 * shard.size


def test_late_range_of_an_arrow_file_does_not_hold_earlier_batches(monkeypatch):
    alive, num_alive = [], []

    def batches():
        for number in range(100):
            batch = pa.RecordBatch.from_pylist([{"n": number}])
            alive.append(weakref.ref(batch))
            num_alive.append(sum(one() is not None for one in alive))
            yield tables._Batch(number, batch)

    shard = Shard("a.arrow", "arrow", 1, "1")
    ((_, table),) = tables._regroup_by_range(
        shard, batches(), [ShardRange(0, 95, 97, 0)], pa.schema([("n", pa.int64())])
    )
    assert table.to_pylist() == [{"n": 95}, {"n": 96}] and max(num_alive) <= 4


@pytest.mark.parametrize("open_writer", [pa.ipc.new_file, pa.ipc.new_stream])
def test_arrow_file_without_a_batch_has_no_rows(tmp_path, open_writer):
    found = io.BytesIO()
    open_writer(found, pa.schema([("text", pa.string())])).close()
    shard = shard_of(str(tmp_path), "a.arrow", found.getvalue())
    assert read_rows(shard, readers.split_into_ranges(shard, 0, 1000)) == [[]]


def test_long_csv_field_is_read(tmp_path):
    rows = [{"text": "x" * 200_000, "n": "1"}, {"text": "y", "n": "2"}]
    shard = shard_of(str(tmp_path), "a.csv", as_csv(rows))
    assert [
        row
        for found in read_rows(shard, readers.split_into_ranges(shard, 0, 1000))
        for row in found
    ] == rows


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.csv", b'text,n\n"a"b,1\n' * 100, "is not valid CSV"),
        ("a.jsonl.gz", gzip.compress(jsonl(ROWS))[:-30], "is truncated or not gzip"),
        (
            "a.jsonl.gz",
            gzip.compress(jsonl(ROWS))[:50] + b"\xff" * 2000,
            "is truncated or not gzip",
        ),
    ],
)
def test_error_of_undecodable_shard_names_it_when_splitting_too(tmp_path, name, content, problem):
    with pytest.raises(DataError, match=f"/{name}: {problem}"):
        readers.split_into_ranges(shard_of(str(tmp_path), name, content), 0, 100)


def test_number_with_too_many_digits_is_a_bad_row(tmp_path):
    content = b'{"a": 1}\n{"a": ' + b"9" * 5000 + b'}\n{"a": 3}\n'
    (rows,) = read_rows(
        shard := shard_of(str(tmp_path), "a.jsonl", content),
        readers.split_into_ranges(shard, 0, 10**6),
    )
    assert rows[::2] == [
        {"a": 1},
        {"a": 3},
    ] and "a.jsonl row 2: is not JSON (a number of thousands of digits" in str(rows[1])
