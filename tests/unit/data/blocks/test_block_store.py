"""Blocks: tokenized once, here or in a process, checked against the index, shared by threads."""

import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from unit.data.data_helpers import chat

from dist_ft.config.schema import Source
from dist_ft.core.errors import DataError, StorageError
from dist_ft.core.world import Collectives, World
from dist_ft.data.blocks import block_store as module
from dist_ft.data.blocks import block_writer
from dist_ft.data.blocks.block_store import BlockStore
from dist_ft.data.blocks.index_builder import split_into_blocks
from dist_ft.data.blocks.tokenizer_pool import TokenizerPool
from dist_ft.data.sources.discovery import discover_shards
from dist_ft.data.tools.write import write_parquet
from dist_ft.storage.filesystem import Store

ROWS = [chat(f"question {i}", f"answer {i}") for i in range(40)]


def same_block(a, b):
    return (
        a.format == b.format
        and a.checksum == b.checksum
        and all(
            np.array_equal(getattr(a, name), getattr(b, name))
            for name in ("tokens", "targets", "offsets")
        )
    )


def store_like(store, **values):
    return BlockStore(
        values.pop("folder", store.folder), store.encoder, store.shards, store.blocks, **values
    )


def test_block_is_tokenized_once_then_read(make, monkeypatch):
    _, store = make(ROWS)
    assert len(store.blocks) > 3
    first = store.block(0)
    assert first is store.block(0) and first.tokens.dtype == np.int32
    monkeypatch.setattr(block_writer, "run_task", lambda *values: pytest.fail("tokenized again"))
    assert same_block(first, store_like(store).block(0))


def test_blocks_hold_all_rows_in_order(make):
    _, store = make(ROWS)
    text = "".join(
        store.encoder.tokenizer.decode(store.block(i).tokens) for i in range(len(store.blocks))
    )
    whole = "".join(
        f"<|im_start|>user\nquestion {i}<|im_end|>\n<|im_start|>assistant\nanswer {i}<|im_end|>\n"
        for i in range(40)
    )
    assert text == whole


def test_concurrent_threads_get_one_block(make, monkeypatch):
    _, store = make(ROWS)
    tasks, run_task = [], block_writer.run_task
    monkeypatch.setattr(
        block_writer, "run_task", lambda *values: (tasks.append(1), run_task(*values))
    )
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda _: store.block(2), range(16)))
    assert len(tasks) == 1 and all(one is found[0] for one in found)


def test_closed_blocks_are_read_again(make):
    _, store = make(ROWS)
    store.max_open_blocks = 1
    before = [store.block(i) for i in range(len(store.blocks))]
    assert len(store._open) == 1
    assert all(same_block(one, store.block(i)) for i, one in enumerate(before))


def test_bad_row_leaves_no_files(make):
    _, store = make([*ROWS[:3], chat("a", "")], block_mib=1)
    with pytest.raises(
        DataError, match=r"train-00000-of-00001.jsonl row 4: messages\[1\].content is empty"
    ):
        store.block(0)
    assert os.listdir(store.folder) == []


def test_bad_row_is_named_by_its_number_in_the_shard(make):
    _, store = make([*ROWS[:33], chat("a", ""), *ROWS[33:]], rows_per_shard=100)
    assert len(store.blocks) > 3
    with pytest.raises(
        DataError, match=r"train-00000-of-00001.jsonl row 34: messages\[1\].content is empty"
    ):
        for number in range(len(store.blocks)):
            store.block(number)


def test_unusable_cache_folder_is_refused(make, tmp_path):
    _, store = make(ROWS)
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"data.cache_dir=.*file: cannot be used .*Set another"):
        store_like(store, folder=tmp_path / "file").block(0)


def test_altered_data_of_the_same_size_and_version_is_refused(make, tmp_path):
    _, store = make(ROWS)
    store.checksums = [store.block(i).checksum for i in range(len(store.blocks))]
    path = tmp_path / "shards" / "train-00000-of-00006.jsonl"
    about = path.stat()
    path.write_text(path.read_text().replace("answer 1", "answer 7"))
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))
    fresh = store_like(store, folder=tmp_path / "other")
    fresh.checksums = store.checksums
    with pytest.raises(
        DataError,
        match=r"train-00000-of-00006.jsonl.*gives other tokens than when the run started, though "
        r"size and version are the same.*Restore the data, or start a run",
    ):
        for number in range(len(store.blocks)):
            fresh.block(number)


def test_changed_shard_is_refused(make, tmp_path):
    _, store = make(ROWS)
    with open(tmp_path / "shards" / "train-00000-of-00006.jsonl", "a") as file:
        file.write("{}\n")
    with pytest.raises(
        DataError, match=r"train-00000-of-00006.jsonl: the shard changed after the data was listed"
    ):
        store.block(0)


def test_pass_over_a_compressed_shard_tokenizes_all_its_blocks(tmp_path, make):
    import gzip

    _, plain = make(ROWS, block_mib=0.0005)
    folder = tmp_path / "zipped"
    folder.mkdir()
    (folder / "a.jsonl.gz").write_bytes(
        gzip.compress(b"".join(json.dumps(row).encode() + b"\n" for row in ROWS), 0)
    )
    shards = discover_shards([Source(path=str(folder))])
    blocks = split_into_blocks(shards, plain.encoder.data, World(), Collectives())
    assert len(blocks) > 3
    store = BlockStore(tmp_path / "cache2", plain.encoder, shards[0], blocks)
    store.block(1)
    assert all(store.path(i).exists() for i in range(len(blocks)))
    assert sum(len(store.block(i).offsets) - 1 for i in range(len(blocks))) == len(ROWS)


@pytest.fixture
def pooled(make, tmp_path, monkeypatch):
    """A plain store, and one whose blocks a process tokenizes."""
    monkeypatch.setattr(module, "SMALL_BYTES", 0)
    _, plain = make(ROWS)
    pool = TokenizerPool(1, plain.encoder, float("inf"), {})
    pooled_store = store_like(plain, folder=tmp_path / "pooled", pool=pool)
    yield plain, pooled_store, pool
    pooled_store.close()


def test_killed_process_is_replaced(pooled):
    plain, pooled_store, pool = pooled
    assert same_block(plain.block(0), pooled_store.block(0))
    (process,) = [found for found in pool._idle.queue if found is not None]
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert same_block(plain.block(1), pooled_store.block(1))


def test_error_of_a_process_is_raised_in_the_worker(make, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SMALL_BYTES", 0)
    _, plain = make([*ROWS[:3], chat("a", "")], block_mib=1)
    pool = TokenizerPool(1, plain.encoder, float("inf"), {})
    store = store_like(plain, folder=tmp_path / "pooled", pool=pool)
    with pytest.raises(
        DataError, match=r"train-00000-of-00001.jsonl row 4: messages\[1\].content is empty"
    ):
        store.block(0)
    store.close()
    assert not any(thread.is_alive() for thread in store._threads._threads)


def test_process_ignores_ctrl_c(pooled):
    plain, pooled_store, pool = pooled
    pooled_store.block(0)
    (process,) = pool._started
    process.send_signal(signal.SIGINT)
    assert same_block(plain.block(1), pooled_store.block(1)) and pool._started == [process]


def test_closing_does_not_wait_for_busy_processes(make, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SMALL_BYTES", 0)
    _, plain = make(ROWS)
    pool = TokenizerPool(1, plain.encoder, float("inf"), {})
    store = store_like(plain, folder=tmp_path / "pooled", pool=pool)
    store.block(0)
    (process,) = pool._started
    process.send_signal(signal.SIGSTOP)  # it never answers
    futures = [store.request(number) for number in (1, 2, 3)]
    time.sleep(0.2)
    started = time.monotonic()
    store.close()
    assert time.monotonic() - started < 3
    assert all(
        future.cancelled() or isinstance(future.exception(), StorageError) for future in futures
    )
    assert pool._started == [process] and process.returncode == -signal.SIGKILL
    with pytest.raises(StorageError, match="data: the tokenizer processes were stopped"):
        pool.run({})


def test_small_data_is_tokenized_without_a_process(make, tmp_path):
    _, plain = make(ROWS)
    store = store_like(
        plain, folder=tmp_path / "other", pool=TokenizerPool(1, plain.encoder, float("inf"), {})
    )
    store.block(0)
    assert store._pool is None


@pytest.fixture
def grouped(make, tmp_path):
    """A store over one Parquet shard of one row group, cut into many blocks."""
    _, plain = make(ROWS, block_mib=0.0001)
    write_parquet(ROWS, Store(str(tmp_path / "parquet")), "a", 1000)
    shards = discover_shards([Source(path=str(tmp_path / "parquet"))])
    blocks = split_into_blocks(shards, plain.encoder.data, World(), Collectives())
    assert len(blocks) > 5
    return BlockStore(tmp_path / "grouped", plain.encoder, shards[0], blocks)


def test_blocks_of_one_row_group_are_tokenized_in_one_pass(grouped, monkeypatch):
    tasks, run_task = [], block_writer.run_task
    monkeypatch.setattr(
        block_writer,
        "run_task",
        lambda encoder, task, limit: (
            tasks.append(len(task["blocks"])),
            run_task(encoder, task, limit),
        ),
    )
    numbers = list(range(1, len(grouped.blocks)))
    found = list(grouped.iter_blocks(numbers))
    assert [number for number, _ in found] == numbers and tasks == [len(numbers)], (
        "exactly the requested blocks"
    )
    assert not grouped.path(0).exists()
    assert sum(len(block.offsets) - 1 for _, block in found) < len(ROWS)


def test_block_of_a_row_group_can_be_requested_alone(grouped):
    last = len(grouped.blocks) - 1
    grouped.block(last)
    assert [grouped.path(number).exists() for number in range(last + 1)] == [False] * last + [True]


def test_each_shard_of_a_block_must_be_unchanged(make, tmp_path):
    _, store = make(ROWS, block_mib=1)
    assert len(store.blocks) == 1 and len(store.shards) > 3
    path = tmp_path / "shards" / "train-00001-of-00006.jsonl"
    path.write_text(path.read_text() + json.dumps(ROWS[0]) + "\n")
    with pytest.raises(
        DataError, match=r"train-00001-of-00006.jsonl: the shard changed after the data was listed"
    ):
        store.block(0)
