"""Unreachable, full or read-only storage gives one error, no partial files and no fallback."""

from __future__ import annotations

import subprocess

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from unit.checkpoint.test_manager import found
from unit.small import checkpoints, make_engine, save, tensors_of

from dist_ft.checkpoint.discovery import list_committed, start_attempt
from dist_ft.checkpoint.ledger import read_ledger
from dist_ft.checkpoint.manager import CheckpointManager
from dist_ft.core.errors import StorageError
from dist_ft.core.world import Collectives, World
from dist_ft.storage.filesystem import Store


class Unreachable(MemoryFileSystem):
    """Storage whose fragment files cannot be read or written while `broken` is set."""

    protocol = "unreachable"
    cachable = False
    broken = ""

    def cat_file(self, path, start=None, end=None, **kwargs):
        if Unreachable.broken == "read" and path.endswith(".safetensors"):
            raise OSError("503 SlowDown")
        return super().cat_file(path, start=start, end=end, **kwargs)

    def pipe_file(self, path, value, mode="overwrite", **kwargs):
        if Unreachable.broken and path.endswith(Unreachable.broken):
            raise OSError("503 SlowDown")
        return super().pipe_file(path, value, mode=mode, **kwargs)

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + path.split("://", 1)[-1].lstrip("/")


@pytest.fixture
def unreachable(quick):
    fsspec.register_implementation("unreachable", Unreachable, clobber=True)
    Unreachable.broken = ""
    store = Store("unreachable://run")
    yield store
    Unreachable.broken = ""
    store.remove("")


def test_unreachable_storage_does_not_cause_a_fallback(unreachable, engine):
    one = CheckpointManager(unreachable, checkpoints(), World(), Collectives(), 1)
    save(one, engine, 1)
    save(one, engine, 2)
    Unreachable.broken = "read"
    with pytest.raises(
        StorageError,
        match=r"step-000000002-a0001/rank-00000-0000\.safetensors: cannot read it \(OSError: "
        r"503 SlowDown\)\. Gave up after 8 attempts\. Check that the endpoint answers",
    ):
        one.load(one.find_latest(), make_engine(), tensors_of(engine))
    with pytest.raises(StorageError, match="503 SlowDown"):
        found(unreachable)
    Unreachable.broken = ""
    assert one.load(one.find_latest(), make_engine(), tensors_of(engine)).progress.step == 2


@pytest.mark.parametrize("suffix", ["0000.safetensors", "-a0001.safetensors.zst", "manifest.json"])
def test_a_failed_save_raises_one_error_and_leaves_no_files(unreachable, engine, suffix):
    one = CheckpointManager(unreachable, checkpoints(), World(), Collectives(), 1)
    save(one, engine, 1)
    Unreachable.broken = suffix
    with pytest.raises(
        StorageError, match=r"cannot write it \(OSError: 503 SlowDown\)\. Gave up after 8 attempts"
    ):
        save(one, engine, 2, np.array([[1, 0, 0, 1, 0, 5]]))
    assert unreachable.list("checkpoints") == ["step-000000001-a0001"]
    Unreachable.broken = ""
    save(one, engine, 3, np.array([[2, 0, 0, 2, 0, 5], [1, 0, 0, 1, 0, 5]]))
    rows = read_ledger(unreachable, one.find_latest())
    assert rows[:, 0].tolist() == [0, 1, 2]  # the steps of the failed save are in the next one


def test_lost_bytes_are_detected_before_the_commit(store, attempt, engine, monkeypatch):
    one = attempt()
    monkeypatch.setattr(
        Store, "sizes", lambda self, path="", real=Store.sizes: dict.fromkeys(real(self, path), 17)
    )
    with pytest.raises(
        StorageError,
        match=r"rank-00000-0000\.safetensors: has 17 bytes, but \d+ were written; the "
        "storage lost data; the checkpoint is not committed",
    ):
        save(one, engine, 1)
    assert list_committed(store) == []


@pytest.fixture
def small_disk(tmp_path):
    """A disk with space for one and a half checkpoints; skipped without the right to mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=448k", "tmpfs", str(folder)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip(
            f"needs root with the right to mount a tmpfs: {mounted.stderr.decode().strip()}"
        )
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_fault_18_a_full_disk_is_reported(small_disk, engine):
    store = Store(str(small_disk / "run"))
    one = CheckpointManager(store, checkpoints(keep_last=1), World(), Collectives(), 1)
    save(one, engine, 1)
    with pytest.raises(
        StorageError,
        match=r"cannot write it \(OSError: .*No space left on device.*\)\. The disk is full\. "
        r"Free some space or keep fewer checkpoints \(checkpoint\.keep_last\)",
    ):
        save(one, engine, 2)
    assert store.list("checkpoints") == ["step-000000001-a0001"] and found(store) == 1
    assert not list(small_disk.rglob(".tmp-*"))


def test_fault_19_a_read_only_disk_is_reported(small_disk, engine):
    store = Store(str(small_disk / "run"))
    one = CheckpointManager(store, checkpoints(), World(), Collectives(), start_attempt(store, 1))
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(
        StorageError,
        match=r"cannot write it \(OSError: .*Read-only file system.*\)\. Access is denied",
    ):
        save(one, engine, 1)
    assert found(store) is None
