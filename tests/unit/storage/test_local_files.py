"""Local files: only regular ones are read; temporary ones of killed processes are removed, of live ones never."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dist_ft.core.errors import DocumentError, StorageError
from dist_ft.storage import local_files
from dist_ft.storage.documents import read_json_texts, read_local_json_object
from dist_ft.storage.error_messages import UnusableFileError
from dist_ft.storage.filesystem import Store
from dist_ft.storage.single_files import read_file


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    # A path of a socket has at most some hundred characters, so it is bound from its folder.
    folder = os.open(path.parent, os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"/proc/self/fd/{folder}/{path.name}")
    os.close(folder)


def make_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


KINDS = {"pipe": make_fifo, "socket": make_socket, "device": make_device}


def within(seconds: float, call: Callable[[], object]) -> object:
    """Return the result of a call, or fail if it does not return."""
    result: list[object] = []

    def run() -> None:
        try:
            result.append(call())
        except BaseException as error:
            result.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert result, f"no answer within {seconds} s"
    return result[0]


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_what_is_no_regular_file_is_refused_at_once(
    make: Callable[[Path], None], tmp_path: Path
) -> None:
    path = tmp_path / "file.json"
    make(path)
    store = Store(str(tmp_path))

    calls: list[Callable[[], object]] = [
        lambda: local_files.read_regular(path),
        lambda: local_files.require_regular(str(path)),
        lambda: local_files.require_regular_files(str(tmp_path)),
        lambda: store.read("file.json"),
        lambda: store.read("file.json", 0, 10),
        lambda: store.read_at_most("file.json", 10),
        lambda: store.read_into("file.json", 0, memoryview(bytearray(10))),
        lambda: store.download(str(tmp_path / "copy")),
        lambda: read_file(str(path)),
        lambda: read_local_json_object(path),
    ]
    for call in calls:
        error = within(10, call)
        assert isinstance(error, UnusableFileError | StorageError | DocumentError), error
        assert "not a regular file" in str(error)
        assert "\n" not in str(error)


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError):
        local_files.read_regular(tmp_path)
    with pytest.raises(StorageError, match="IsADirectoryError"):
        Store(str(tmp_path.parent)).read(tmp_path.name)


def test_a_regular_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")
    store = Store(str(tmp_path))

    assert local_files.read_regular(path) == b"0123456789"
    assert local_files.read_regular(path, 10) == b"0123456789"
    assert store.read("file", 2, 5) == b"234"
    assert store.read_at_most("file", 10) == b"0123456789"
    local_files.require_regular_files(str(tmp_path))


def test_a_file_of_proc_has_no_size_but_content() -> None:
    assert local_files.read_regular("/proc/self/status", 2**20)


def test_a_file_above_the_limit_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with open(path, "wb") as file:
        file.truncate(2**40)  # a sparse file of a TiB

    error = within(10, lambda: Store(str(tmp_path)).read_at_most("file", 2**20))
    assert isinstance(error, StorageError)
    assert "is larger than 1 MiB" in str(error)


def test_no_more_memory_than_the_file_has(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    # The numbers of a damaged manifest: memory for all of it would be allocated first.
    with pytest.raises(StorageError, match="got 3 of"):
        Store(str(tmp_path)).read("file", 0, 2**60)


def test_an_empty_object_is_read_by_range() -> None:
    store = Store("memory://documents")
    store.write("empty", b"")
    store.write("some", b"abc")
    assert store.read_at_most("empty", 10) == b""
    assert store.read_at_most("some", 3) == b"abc"
    with pytest.raises(StorageError, match="is larger than"):
        store.read_at_most("some", 2)


@pytest.mark.parametrize("content", ["[1]", '{"a": 1}', '"a"', "[[]]", "[null]"])
def test_a_list_of_texts_has_texts(content: str, tmp_path: Path) -> None:
    (tmp_path / "labels.json").write_text(content)
    with pytest.raises(DocumentError, match="must be a JSON list of texts"):
        read_json_texts(Store(str(tmp_path)), "labels.json")


def test_names_of_files_are_escaped_in_errors(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    name = os.fsdecode(b"\x1b]0;owned\x07\xff\n.json")
    for call in (lambda: store.read(name), lambda: store.read_at_most(name, 5)):
        with pytest.raises(StorageError) as caught:
            call()
        text = str(caught.value)
        assert "\\x1b]0;owned\\x07\\udcff\\n.json" in text.split(": cannot")[0]


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
