"""The ledger is a complete, unaltered history of the samples the model was trained on."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from safetensors.numpy import save
from unit.checkpoint.test_manifest import make
from unit.small import batch

from dist_ft.checkpoint.ledger import (
    COLUMNS,
    LedgerBuffer,
    LedgerRows,
    pack_rows,
    read_ledger,
    unpack_rows,
    write_segment,
)
from dist_ft.checkpoint.manifest import LedgerEntry, Progress, file_entry
from dist_ft.core.errors import CheckpointError
from dist_ft.data.batch import empty_batch
from dist_ft.storage.filesystem import Store


def rows(*steps: int) -> np.ndarray:
    return np.array(
        [[step, 0, lane, step * 10 + lane, 0, 5] for step in steps for lane in (1, 0)],
        dtype=np.int64,
    )


def zipped(content: bytes) -> bytes:
    import pyarrow

    return len(content).to_bytes(8, "little") + pyarrow.Codec("zstd").compress(
        content, asbytes=True
    )


def manifest_of(*segments: LedgerEntry, step: int | None = None):
    stop = segments[-1].stop if segments else 0
    return make(
        ledger=segments, progress=Progress(step=stop if step is None else step, optimizer_step=0)
    )


@pytest.fixture
def store(tmp_path):
    return Store(str(tmp_path))


def test_the_buffer_records_segments_of_batches():
    buffer = LedgerBuffer()
    buffer.add(4, [batch((3, 4), seed=2, lane=1, epoch=1), empty_batch(lane=2)])
    assert len(COLUMNS) == 6
    assert buffer.take().samples.tolist() == [[4, 1, 1, 2000, 0, 3], [4, 1, 1, 2001, 0, 4]]
    assert buffer.take().samples.shape == (0, 6)


def test_restored_rows_come_first():
    buffer = LedgerBuffer()
    buffer.add(0, [batch((3,), seed=1)])
    first = buffer.take()
    buffer.restore(first)
    buffer.add(1, [batch((4,), seed=2)])
    assert buffer.take().samples[:, 0].tolist() == [0, 1]


def test_segments_are_read_in_order_of_step_and_lane(store):
    first = write_segment(
        store, 0, 2, 1, [LedgerRows(rows(0)[:1]), LedgerRows(rows(1, 0)[[0, 1, 3]])]
    )
    second = write_segment(
        store, 2, 3, 2, [LedgerRows(rows(2)), LedgerRows(np.zeros((0, 6), dtype=np.int64))]
    )
    assert first.file.path == "ledger/000000000-000000002-a0001.safetensors.zst"
    read = read_ledger(store, manifest_of(first, second))
    assert read[:, [0, 2]].tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], [2, 0], [2, 1]]
    assert read_ledger(store, manifest_of()).shape == (0, 6)


def test_an_altered_segment_is_rejected(store):
    segment = write_segment(store, 0, 1, 1, [LedgerRows(rows(0))])
    content = bytearray(store.read(segment.file.path))
    content[-1] ^= 1
    store.write(segment.file.path, bytes(content))
    with pytest.raises(CheckpointError) as caught:
        read_ledger(store, manifest_of(segment))
    assert str(caught.value) == (
        f"{store.url}/{segment.file.path}: altered since it was written. The history of steps "
        "0 to 1 cannot be verified. Restore the file from a copy."
    )


def test_a_gap_is_rejected(store):
    first, third = (write_segment(store, s, s + 1, 1, [LedgerRows(rows(s))]) for s in (0, 2))
    with pytest.raises(
        CheckpointError, match=r"starts at step 2, expected 1\. The history has a gap"
    ):
        read_ledger(store, manifest_of(first, third))
    with pytest.raises(
        CheckpointError,
        match=r"ends at step 1, the checkpoint is at step 5\. The history has a gap",
    ):
        read_ledger(store, manifest_of(first, step=5))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no safetensors", "not a valid ledger segment"),
        (b"", "not a valid ledger segment"),
        (zipped(save({"other": rows(0)})), r"not a valid ledger segment \('step'\)"),
        (
            zipped(save({**{name: np.zeros(2) for name in COLUMNS}, "lane": np.zeros(3)})),
            "not a valid ledger segment",
        ),
        (
            (2**40).to_bytes(8, "little") + zipped(b"x")[8:],
            r"not a valid ledger segment \(1099511627776 bytes\)",
        ),
    ],
)
def test_fault_23_a_hostile_segment_is_rejected(store, content, message):
    store.write("ledger/x", content)
    with pytest.raises(CheckpointError, match=message):
        read_ledger(
            store, manifest_of(LedgerEntry(start=0, stop=1, file=file_entry("ledger/x", content)))
        )


def test_a_segment_is_compact():
    """100,000 rows as a run writes them take a few bytes each."""
    drawn = np.random.default_rng(0)
    many = np.column_stack(
        [
            np.arange(100_000) // 40,
            np.zeros(100_000, int),
            np.arange(100_000) // 5 % 8,
            drawn.integers(0, 10**7, 100_000),
            np.zeros(100_000, int),
            drawn.integers(10, 900, 100_000),
        ]
    )
    many = many[np.lexsort((many[:, 3], many[:, 2], many[:, 0]))].astype(np.int64)
    packed = pack_rows(LedgerRows(many))
    assert np.array_equal(unpack_rows(packed, "x").samples, many)
    assert len(packed) / len(many) < 8


def test_a_segment_that_states_gigabytes_takes_no_memory():
    """Memory of the stated size was allocated before a byte was decompressed."""
    packed = pack_rows(LedgerRows(rows(0)))
    hostile = (2**32).to_bytes(8, "little") + packed[8:]
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=r"not a valid ledger segment \(.* are missing"):
            unpack_rows(hostile, "x")
        assert tracemalloc.get_traced_memory()[1] < 2**26
    finally:
        tracemalloc.stop()

    with pytest.raises(CheckpointError, match="more than 10 bytes"):
        unpack_rows((10).to_bytes(8, "little") + packed[8:], "x")
