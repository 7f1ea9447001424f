"""Temporary files: those of killed processes are removed, those of live ones never."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dist_ft.storage import local_files
from dist_ft.storage.filesystem import Store

WRITER = """
import os, signal, sys
from dist_ft.storage import local_files
real = os.fsync
def stop(descriptor):
    print("writing", flush=True)
    sys.stdin.readline()
    real(descriptor)
os.fsync = stop
local_files.write_file(sys.argv[1], b"content")
print("written", flush=True)
"""


def temporary_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob(".tmp-*"))


@pytest.fixture
def writer(tmp_path):
    """A process in the middle of writing tmp_path/deep/file."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path / "deep" / "file")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "writing\n"
    yield process
    process.kill()
    process.wait()


def test_finding_7_files_of_a_live_process_stay_and_those_of_a_killed_one_go(tmp_path, writer):
    (half_written,) = temporary_files(tmp_path)
    assert local_files.remove_leftovers(str(tmp_path)) == 0 and half_written.exists()

    writer.kill()
    writer.wait()
    assert half_written.exists()
    assert Store(str(tmp_path)).remove_leftovers() == 1
    assert temporary_files(tmp_path) == []


def test_a_write_ends_well_next_to_a_collection(tmp_path, writer):
    assert local_files.remove_leftovers(str(tmp_path)) == 0
    writer.stdin.write("\n" * 9)
    writer.stdin.flush()
    assert writer.wait(30) == 0
    assert (tmp_path / "deep" / "file").read_bytes() == b"content"
    assert temporary_files(tmp_path) == []


def test_many_writes_next_to_collections_lose_nothing(tmp_path):
    ended = threading.Event()

    def collect() -> None:
        while not ended.is_set():
            local_files.remove_leftovers(str(tmp_path))

    collectors = [threading.Thread(target=collect) for _ in range(3)]
    for collector in collectors:
        collector.start()
    try:
        for number in range(200):
            local_files.write_file(str(tmp_path / "file"), str(number).encode())
            assert (tmp_path / "file").read_bytes() == str(number).encode()
    finally:
        ended.set()
        for collector in collectors:
            collector.join()
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("age_s", [0, 2 * local_files.FOREIGN_AGE_S])
def test_files_of_another_machine_or_version_go_once_they_are_old(tmp_path, age_s):
    foreign = tmp_path / ".tmp-file-0a1b2c3d"
    foreign.write_bytes(b"x")
    then = time.time() - age_s
    os.utime(foreign, (then, then))
    assert local_files.remove_leftovers(str(tmp_path)) == int(age_s > 0)
    assert foreign.exists() == (age_s == 0)


def test_what_is_no_plain_file_stays(tmp_path):
    machine = local_files._machine()
    outside = tmp_path / "outside"
    outside.write_bytes(b"x")
    folder = tmp_path / "run"
    (folder / f".tmp-folder-{machine}-00000000").mkdir(parents=True)
    (folder / f".tmp-link-{machine}-00000000").symlink_to(outside)
    os.mkfifo(folder / f".tmp-fifo-{machine}-00000000")
    assert local_files.remove_leftovers(str(folder)) == 0
    assert len(list(folder.iterdir())) == 3 and outside.exists()


def test_nothing_is_removed_without_locks(tmp_path, writer, monkeypatch):
    """Some network file systems have none."""

    def flock(*_):
        raise OSError(38, "Function not implemented")

    writer.kill()
    writer.wait()
    monkeypatch.setattr(local_files.fcntl, "flock", flock)
    assert local_files.remove_leftovers(str(tmp_path)) == 0
    local_files.write_file(str(tmp_path / "other"), b"x")
    assert (tmp_path / "other").read_bytes() == b"x"


def test_an_absent_folder_has_no_leftovers(tmp_path):
    assert local_files.remove_leftovers(str(tmp_path / "absent")) == 0
    assert Store("memory://leftovers").remove_leftovers() == 0
