"""The table of shards: what goes in comes out, shards are found by bytes, damage is refused."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_ft.core.errors import DataError
from dist_ft.data.sources import shard_table
from dist_ft.data.sources.discovery import Shard
from dist_ft.data.sources.shard_table import ShardTable, check_table, write_table


def shard(number: int, size: int = 10) -> Shard:
    return Shard(f"s3://bucket/part-{number}.jsonl", "jsonl", size, f'"{number}"')


def test_shards_come_back(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_table, "BATCH_SHARDS", 3)
    sources = [[shard(n) for n in range(7)], [Shard("a.parquet", "parquet", 5, "é"), shard(9)]]
    path = tmp_path / "shards.arrow"
    write_table(path, iter([iter(own) for own in sources]))
    check_table(path)
    table = ShardTable(path)
    assert len(table) == 9
    assert [table[n] for n in range(9)] == [*sources[0], *sources[1]]
    assert [list(table.iter_source(source)) for source in range(2)] == sources
    assert [table.num_shards(0), table.num_shards(1)] == [7, 2]
    assert [table.total_bytes(0), table.total_bytes(1)] == [70, 15]
    with pytest.raises(IndexError):
        table[9]


@settings(max_examples=50, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    first=st.integers(0, 60),
    width=st.integers(1, 30),
)
def test_shards_are_located_by_bytes(tmp_path_factory, sizes, first, width):
    path = tmp_path_factory.mktemp("table") / "shards.arrow"
    write_table(path, [[shard(99)], [shard(n, size) for n, size in enumerate(sizes)]])
    edges = np.cumsum([0, *sizes]).tolist()
    expected = [
        (1 + n, start)
        for n, (start, stop) in enumerate(pairwise(edges))
        if start < first + width and stop > first
    ]
    assert list(map(tuple, ShardTable(path).locate(1, first, first + width))) == expected


@pytest.mark.parametrize("content", [b"", b"no table", b"ARROW1\0\0" + b"x" * 500])
def test_a_damaged_file_is_one_clear_line(tmp_path, content):
    path = tmp_path / "shards.arrow"
    path.write_bytes(content)
    for read in (ShardTable, check_table):
        with pytest.raises(DataError, match=r"shards\.arrow: the table of shards is damaged \("):
            read(path)


def test_other_columns_are_refused(tmp_path):
    import pyarrow

    path = tmp_path / "shards.arrow"
    table = pyarrow.table({"url": ["a"]})
    with (
        pyarrow.OSFile(str(path), "wb") as sink,
        pyarrow.ipc.new_file(sink, table.schema) as writer,
    ):
        writer.write_table(table)
    with pytest.raises(DataError, match="is damaged"):
        ShardTable(path)


def test_a_negative_size_is_refused(tmp_path):
    path = tmp_path / "shards.arrow"
    write_table(path, [[shard(0, -1)]])
    with pytest.raises(DataError, match="is damaged"):
        ShardTable(path)
