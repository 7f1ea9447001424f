"""Every row of a source lies in exactly one slice, whatever its shards look like."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dist_ft.config.schema import Source
from dist_ft.core.errors import DataError
from dist_ft.data.blocks.slices import SAMPLE_BITS, Slices, first_sample, is_splittable
from dist_ft.data.sampling.stream_order import StreamLayout
from dist_ft.data.sources import readers
from dist_ft.data.sources.discovery import discover_shards
from dist_ft.data.sources.shard_table import ShardTable, write_table

line_breaks = st.sampled_from([b"\n", b"\r\n", b"\n\n", b"\n  \n"])
texts = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=60)


def rows_of(slices: Slices, numbers: range) -> list[Any]:
    """Return the rows of slices, read one after the other in one pass over each shard."""
    found = []
    for number in numbers:
        for part in slices.block(number).ranges:
            shard = slices.shards[part.shard]
            for _, rows in readers.read_ranges(shard, [part]):
                found += rows if isinstance(rows, list) else rows.to_pylist()
    return found


def table_of(sources: list[Source], path: Path) -> ShardTable:
    write_table(path, discover_shards(sources))
    return ShardTable(path)


def sliced(folder: Path, num_blocks: int, slices_per_block: int) -> Slices:
    table = table_of([Source(path=str(folder))], folder.parent / f"{folder.name}.arrow")
    layout = StreamLayout(table.total_bytes(0), num_blocks, slices_per_block)
    return Slices(table, {0: layout})


def whole(slices: Slices, count: int) -> list[Any]:
    rows: list[Any] = []
    for number in range(count):
        rows += readers.iter_rows(slices.shards[number])
    return rows


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    shards=st.lists(
        st.lists(st.tuples(texts, line_breaks), min_size=1, max_size=12), min_size=1, max_size=5
    ),
    has_last_break=st.booleans(),
    num_blocks=st.integers(1, 12),
    slices_per_block=st.integers(1, 6),
)
def test_every_line_is_in_one_slice(
    tmp_path_factory, shards, has_last_break, num_blocks, slices_per_block
):
    folder = tmp_path_factory.mktemp("slices")
    for number, lines in enumerate(shards):
        content = b"".join(
            json.dumps({"text": text}, ensure_ascii=False).encode() + end for text, end in lines
        )
        if not has_last_break:
            content = content.rstrip()
        (folder / f"part-{number}.jsonl").write_bytes(content)

    slices = sliced(folder, num_blocks, slices_per_block)
    expected = whole(slices, len(shards))
    assert rows_of(slices, range(slices.count)) == expected

    # in one pass over all ranges, in which touching ones are read in one piece
    joined = []
    ranges: dict[int, list[Any]] = {}
    for number in range(slices.count):
        for part in slices.block(number).ranges:
            ranges.setdefault(part.shard, []).append(part)
    for shard, parts in ranges.items():
        for _, rows in readers.read_ranges(slices.shards[shard], parts):
            joined += rows
    assert joined == expected


@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    counts=st.lists(st.integers(1, 60), min_size=1, max_size=4),
    rows_per_group=st.integers(1, 40),
    num_blocks=st.integers(1, 9),
    slices_per_block=st.integers(1, 5),
)
def test_every_row_of_parquet_is_in_one_slice(
    tmp_path_factory, counts, rows_per_group, num_blocks, slices_per_block
):
    import pyarrow
    import pyarrow.parquet

    folder = tmp_path_factory.mktemp("slices")
    for number, count in enumerate(counts):
        table = pyarrow.table(
            {"text": [f"{number} {row} " + "x" * (row % 7) for row in range(count)]}
        )
        pyarrow.parquet.write_table(
            table, folder / f"part-{number}.parquet", row_group_size=rows_per_group
        )

    slices = sliced(folder, num_blocks, slices_per_block)
    assert rows_of(slices, range(slices.count)) == whole(slices, len(counts))


def test_shards_that_cannot_be_split_are_whole(tmp_path):
    for number in range(9):
        rows = "".join(json.dumps({"text": f"{number} {row}"}) + "\n" for row in range(5))
        (tmp_path / f"part-{number}.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
    slices = sliced(tmp_path, 7, 1)
    assert not any(is_splittable(slices.shards[number]) for number in range(9))
    assert rows_of(slices, range(slices.count)) == whole(slices, 9)
    starts = [part.start for number in range(7) for part in slices.block(number).ranges]
    assert starts == [0] * 9


def test_a_line_over_several_slices_belongs_to_the_first(tmp_path):
    rows = [{"text": "a"}, {"text": "b" * 900}, {"text": "c"}]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    slices = sliced(tmp_path, 8, 1)
    by_slice = [len(rows_of(slices, range(number, number + 1))) for number in range(8)]
    assert by_slice == [2, 0, 0, 0, 0, 0, 0, 1]


def test_a_line_that_is_too_long_is_a_bad_row_of_its_slice(tmp_path):
    rows = ['{"text": "a"}', '{"text": "' + "b" * 5000 + '"}', '{"text": "c"}']
    (tmp_path / "x.jsonl").write_text("\n".join(rows) + "\n")
    slices = sliced(tmp_path, 4, 1)
    found = []
    for number in range(4):
        for part in slices.block(number).ranges:
            for _, rows_found in readers.read_ranges(slices.shards[0], [part], 1000):
                found += rows_found
    assert [isinstance(row, DataError) for row in found] == [False, True, False]


def test_numbers_over_all_sources(tmp_path):
    for source in range(3):
        (tmp_path / str(source)).mkdir()
        (tmp_path / str(source) / "x.jsonl").write_text('{"text": "a"}\n' * 50)
    sources = [Source(path=str(tmp_path / str(source))) for source in range(3)]
    table = table_of(sources, tmp_path / "shards.arrow")
    size = table.total_bytes(0)
    slices = Slices(table, {0: StreamLayout(size, 3, 2), 2: StreamLayout(size, 5, 1)})
    assert slices.count == 11
    assert [tuple(slices.find(number)) for number in (0, 5, 6, 10)] == [
        (0, 0),
        (0, 5),
        (2, 0),
        (2, 4),
    ]
    assert slices.block(6).source == 2
    assert slices.block(6).ranges[0].shard == 2
    assert first_sample(0) == 1 << SAMPLE_BITS
