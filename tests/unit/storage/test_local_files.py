"""Local files: only regular ones are read, whatever else stands in their place."""

from __future__ import annotations

import os
import socket
import threading
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
