"""Ranges of files are widened to blocks, verified, read ahead and returned in order."""

from __future__ import annotations

import re
import time
from uuid import uuid4

import numpy as np
import pytest

from dist_ft.checkpoint import checked_reads, manifest
from dist_ft.checkpoint.checked_reads import ByteRange, CheckedFiles
from dist_ft.checkpoint.manifest import DamagedError
from dist_ft.storage.filesystem import Store

CONTENT = np.random.default_rng(0).integers(0, 256, 1050, dtype=np.uint8).tobytes()


@pytest.fixture(params=["local", "memory"])
def store(request, tmp_path):
    return Store(str(tmp_path) if request.param == "local" else f"memory://{uuid4().hex}")


def files(
    store: Store, entry=manifest.file_entry_in_blocks, names: tuple[str, ...] = ("f",)
) -> CheckedFiles:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifest, "BLOCK_BYTES", 100)
        entries = [entry(name, memoryview(CONTENT)) for name in names]
    for name in names:
        store.write(name, CONTENT)
    return CheckedFiles(store, entries)


@pytest.mark.parametrize(
    ("start", "stop", "first", "last"),
    [
        (0, 1, 0, 100),
        (99, 101, 0, 200),
        (200, 300, 200, 300),
        (1000, 1050, 1000, 1050),
        (5, 1049, 0, 1050),
        (7, 7, 0, 100),
    ],
)
def test_a_range_is_widened_to_whole_blocks(store, start, stop, first, last):
    found = files(store).read("f", start, stop)
    assert (found.start, bytes(found.content)) == (first, CONTENT[first:last])
    assert bytes(found.slice(start, stop)) == CONTENT[start:stop]


def test_a_file_without_block_checksums_is_read_whole(store):
    whole = files(store, manifest.file_entry)
    assert bytes(whole.read("f", 5, 6).content) == CONTENT
    assert (
        whole.window_bytes("f", 16) == len(CONTENT) and files(store).window_bytes("f", 350) == 300
    )


def test_damage_is_detected_only_in_the_blocks_that_are_read(store):
    checked = files(store)
    damaged = bytearray(CONTENT)
    damaged[450] ^= 1
    store.write("f", bytes(damaged))
    assert bytes(checked.read("f", 300, 400).content) == CONTENT[300:400]
    with pytest.raises(
        DamagedError,
        match=re.escape(f"{store.redacted_url('f')}: its checksum differs from the manifest's"),
    ):
        checked.read("f", 399, 401)
    store.remove("f")
    with pytest.raises(DamagedError, match="f: the file is missing"):
        checked.read("f", 300, 400)


def test_ranges_are_returned_in_order_whatever_each_read_takes(store, monkeypatch):
    checked = files(store, names=("a", "b", "c"))
    ranges = [
        ByteRange(name, start, start + 50)
        for start in range(0, 1000, 50)
        for name in ("c", "a", "b")
    ]

    def slow(self, path, start, memory, real=Store.read_into):
        time.sleep(0.01 if path == "c" else 0)
        return real(self, path, start, memory)

    monkeypatch.setattr(Store, "read_into", slow)
    got = [
        bytes(found.slice(start, stop))
        for found, (_, start, stop) in zip(checked.read_all(ranges), ranges, strict=True)
    ]
    assert got == [CONTENT[start:stop] for _, start, stop in ranges]


def test_buffers_are_bounded_by_the_read_ahead(tmp_path):
    checked = files(Store(str(tmp_path)))
    addresses = {
        found.content.obj.__array_interface__["data"][0]
        for found in checked.read_all(
            [ByteRange("f", start, start + 1) for start in range(0, 1050, 100)] * 5
        )
    }
    assert len(addresses) <= checked_reads.NUM_READ_AHEAD + 1


def test_a_file_that_was_cut_off_on_disk_is_damaged_and_read_once(tmp_path):
    """Readers that do not list the folder first waited half a minute for it to grow."""
    store = Store(str(tmp_path))
    cut = files(store)
    store.write("f", CONTENT[:500])
    started = time.monotonic()
    with pytest.raises(DamagedError, match="f: is shorter than according to the manifest"):
        cut.read("f", 400, 800)
    assert time.monotonic() - started < 1
