"""Rewriting data: the same rows or the same tokens, in the same order, resumed if interrupted."""

import json

import numpy as np
import pytest
from unit.data.data_helpers import chat, data_section

from dist_ft.config.schema import Source
from dist_ft.core.errors import DataError
from dist_ft.core.world import Collectives, World
from dist_ft.data.blocks.block_store import BlockStore
from dist_ft.data.blocks.index_builder import split_into_blocks
from dist_ft.data.encoding.chat import Encoder
from dist_ft.data.sources import readers
from dist_ft.data.sources.discovery import discover_shards
from dist_ft.data.tools.rewrite import COMPLETE, SOURCE, rewrite_blocks
from dist_ft.storage.filesystem import Store

ROWS = [chat(f"question {i}", f"answer {i}") for i in range(40)]


def open_store(folder, store, tmp_path):
    shards = discover_shards([Source(path=str(folder))])
    data = data_section(block_mib=0.001)
    blocks = split_into_blocks(shards, data, World(), Collectives())
    return BlockStore(
        tmp_path / "other-cache", Encoder(store.encoder.tokenizer, data), shards[0], blocks
    )


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_rewritten_rows_are_the_same(make, tmp_path, suffix):
    _, store = make(ROWS)
    out = Store(str(tmp_path / "out"))
    assert rewrite_blocks(store, out, suffix, tokenize=False) == len(store.blocks) > 3
    (shards,) = discover_shards([Source(path=out.url)])
    found = [
        row
        for shard in shards
        for _, rows in readers.read_ranges(shard, readers.split_into_ranges(shard, 0, 10**6))
        for row in (rows if isinstance(rows, list) else rows.to_pylist())
    ]
    assert found == ROWS


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_written_tokens_equal_those_of_the_rows(make, tmp_path, suffix):
    _, store = make(ROWS)
    rewrite_blocks(store, Store(str(tmp_path / "out")), suffix, tokenize=True)
    rewritten = open_store(tmp_path / "out", store, tmp_path)
    assert rewritten.block(0).format == "tokens"
    for name in ("tokens", "targets"):
        one, other = (
            np.concatenate([getattr(s.block(i), name) for i in range(len(s.blocks))])
            for s in (store, rewritten)
        )
        assert np.array_equal(one, other)


def test_interrupted_rewrite_is_resumed(make, tmp_path):
    _, store = make(ROWS)
    out = Store(str(tmp_path / "out"))
    total = rewrite_blocks(store, out, "parquet", tokenize=False)
    names = out.list()
    for name in (COMPLETE, names[3]):
        out.remove(name)
    seen = []
    assert (
        rewrite_blocks(store, out, "parquet", False, lambda done, whole: seen.append((done, whole)))
        == 1
    )
    assert out.list() == names and seen[-1] == (total, total)
    assert rewrite_blocks(store, out, "parquet", False) == 0


def test_rewrite_of_an_earlier_version_is_resumed(make, tmp_path):
    _, store = make(ROWS)
    out = Store(str(tmp_path / "out"))
    rewrite_blocks(store, out, "parquet", tokenize=False)
    source = json.loads(out.read(SOURCE))
    source = {"suffix": source["suffix"], "old": source["tokenized"], "blocks": source["blocks"]}
    out.write(SOURCE, json.dumps(source).encode())
    out.remove(COMPLETE)
    assert rewrite_blocks(store, out, "parquet", tokenize=False) == 0


def test_other_data_in_the_folder_is_refused(make, tmp_path):
    _, store = make(ROWS)
    out = Store(str(tmp_path / "out"))
    rewrite_blocks(store, out, "parquet", tokenize=False)
    with pytest.raises(
        DataError,
        match=r"--out=.*out: holds shards that were written from other data or in another way. "
        r"It must be an empty folder, or .* the same arguments. Choose another folder",
    ):
        rewrite_blocks(store, out, "parquet", tokenize=True)


def test_interrupted_rewrite_is_not_resumed_with_other_data(make, tmp_path):
    _, store = make(ROWS)
    out = Store(str(tmp_path / "out"))
    rewrite_blocks(store, out, "parquet", tokenize=False)
    out.remove(COMPLETE)
    _, other = make([chat(f"question {i}", f"ANSWER {i}") for i in range(40)], cache="cache2")
    assert len(other.blocks) == len(store.blocks)
    with pytest.raises(DataError, match="holds shards that were written from other data"):
        rewrite_blocks(other, out, "parquet", tokenize=False)


def test_folder_with_other_files_is_refused(make, tmp_path):
    _, store = make(ROWS)
    Store(str(tmp_path / "out")).write("mine.txt", b"precious")
    with pytest.raises(
        DataError, match="It must be an empty folder, or that of an interrupted call"
    ):
        rewrite_blocks(store, Store(str(tmp_path / "out")), "parquet", tokenize=False)


def test_bad_row_is_not_written(make, tmp_path):
    _, store = make(ROWS)
    path = tmp_path / "shards" / "train-00000-of-00006.jsonl"
    path.write_text(path.read_text().replace('{"messages"', '{messages"', 1) + " ")
    with pytest.raises(DataError, match=r"row 1: is not JSON"):
        rewrite_blocks(store, Store(str(tmp_path / "out")), "jsonl", tokenize=False)
