"""Writing data anew: the same rows or the same tokens, in the same order, going on where it was cut off."""

import numpy as np
import pytest
from unit.data.data_helpers import chat, data_section

from dist_ft.config.schema import Source
from dist_ft.core.errors import DataError
from dist_ft.core.world import Collectives, World
from dist_ft.data.blocks.block_store import BlockStore
from dist_ft.data.blocks.index import cut_into_blocks
from dist_ft.data.encoding.chat import Encoder
from dist_ft.data.sources import readers
from dist_ft.data.sources.discovery import resolve
from dist_ft.data.tools.rewrite import COMPLETE, convert
from dist_ft.storage.filesystem import Store

ROWS = [chat(f"question {i}", f"answer {i}") for i in range(40)]


def opened(folder, store, tmp_path):
    shards = resolve([Source(path=str(folder))])
    data = data_section(block_mib=0.001)
    blocks = cut_into_blocks(shards, data, World(), Collectives())
    return BlockStore(
        tmp_path / "other-cache", Encoder(store.encoder.tokenizer, data), shards[0], blocks
    )


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_rows_stay_the_same(make, tmp_path, suffix):
    _, store = make(ROWS)
    out = Store(str(tmp_path / "out"))
    assert convert(store, out, suffix, tokenise=False) == len(store.blocks) > 3
    (shards,) = resolve([Source(path=out.url)])
    found = [
        row
        for shard in shards
        for _, rows in readers.read(shard, readers.survey(shard, 0, 10**6))
        for row in (rows if isinstance(rows, list) else rows.to_pylist())
    ]
    assert found == ROWS


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_tokens_made_ahead_are_those_made_on_the_way(make, tmp_path, suffix):
    _, store = make(ROWS)
    convert(store, Store(str(tmp_path / "out")), suffix, tokenise=True)
    ahead = opened(tmp_path / "out", store, tmp_path)
    assert ahead.block(0).format == "tokens"
    for name in ("tokens", "targets"):
        one, other = (
            np.concatenate([getattr(s.block(i), name) for i in range(len(s.blocks))])
            for s in (store, ahead)
        )
        assert np.array_equal(one, other)


def test_it_goes_on_where_it_was_cut_off(make, tmp_path):
    _, store = make(ROWS)
    out = Store(str(tmp_path / "out"))
    total = convert(store, out, "parquet", tokenise=False)
    names = out.list()
    for name in (COMPLETE, names[3]):
        out.remove(name)
    seen = []
    assert (
        convert(store, out, "parquet", False, lambda done, whole: seen.append((done, whole))) == 1
    )
    assert out.list() == names and seen[-1] == (total, total)
    assert convert(store, out, "parquet", False) == 0


def test_other_data_in_the_folder_is_refused(make, tmp_path):
    _, store = make(ROWS)
    out = Store(str(tmp_path / "out"))
    convert(store, out, "parquet", tokenise=False)
    with pytest.raises(
        DataError,
        match=r"--out=.*out: holds shards that were written from other data or in another way; an "
        r"empty folder, or the same call again, is allowed; choose another folder",
    ):
        convert(store, out, "parquet", tokenise=True)


def test_a_writing_that_was_cut_off_is_not_gone_on_with_from_other_data(make, tmp_path):
    _, store = make(ROWS)
    out = Store(str(tmp_path / "out"))
    convert(store, out, "parquet", tokenise=False)
    out.remove(COMPLETE)
    _, other = make([chat(f"question {i}", f"ANSWER {i}") for i in range(40)], cache="cache2")
    assert len(other.blocks) == len(store.blocks)
    with pytest.raises(DataError, match="holds shards that were written from other data"):
        convert(other, out, "parquet", tokenise=False)


def test_a_folder_with_other_files_is_refused(make, tmp_path):
    _, store = make(ROWS)
    Store(str(tmp_path / "out")).write("mine.txt", b"precious")
    with pytest.raises(DataError, match="an empty folder, or the same call again, is allowed"):
        convert(store, Store(str(tmp_path / "out")), "parquet", tokenise=False)


def test_a_bad_row_is_not_written(make, tmp_path):
    _, store = make(ROWS)
    path = tmp_path / "shards" / "train-00000-of-00006.jsonl"
    path.write_text(path.read_text().replace('{"messages"', '{messages"', 1) + " ")
    with pytest.raises(DataError, match=r"row 1: is not JSON"):
        convert(store, Store(str(tmp_path / "out")), "jsonl", tokenise=False)
