"""Storage: atomic writes, exclusive creation, retries only where they help, and clear errors."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import threading
import time
from typing import ClassVar
from uuid import uuid4

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from dist_ft.core.errors import StorageError
from dist_ft.storage import filesystem, retry
from dist_ft.storage.filesystem import Store
from dist_ft.storage.retry import retry_limit


@pytest.fixture(params=["path", "file", "memory"])
def store(request, tmp_path):
    """A store on a folder, at a file:// URL, and in memory: all behave alike."""
    url = {
        "path": str(tmp_path / "s"),
        "file": f"file://{tmp_path}/s",
        "memory": f"memory://{uuid4().hex}/s",
    }
    return Store(url[request.param])


class Flaky(MemoryFileSystem):
    """A filesystem whose first reads raise the errors of the test."""

    protocol = "flaky"
    cachable = False
    failures: ClassVar[list[Exception]] = []
    calls = 0

    def cat_file(self, path, start=None, end=None, **kwargs):
        Flaky.calls += 1
        if Flaky.failures:
            raise Flaky.failures.pop(0)
        return super().cat_file(path, start=start, end=end, **kwargs)

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + path.split("://", 1)[-1].lstrip("/")


@pytest.fixture
def flaky(monkeypatch):
    """Return a function: errors of the next reads -> a store on a filesystem that raises them."""
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    monkeypatch.setattr(retry, "wait_random_exponential", lambda **_: lambda state: 0)

    def prepare(*failures, url="flaky://bucket"):
        Flaky.failures, Flaky.calls = list(failures), 0
        Flaky().pipe_file("/bucket/file", b"0123456789")
        return Store(url)

    return prepare


# Files and folders


def test_files_are_read_whole_and_in_ranges(store):
    store.write("deep/er/file", b"0123456789")
    assert store.read("deep/er/file") == b"0123456789"
    assert store.read("deep/er/file", 2, 5) == b"234"
    assert store.read("deep/er/file", 7) == b"789"
    memory = memoryview(bytearray(3))
    assert store.read_into("deep/er/file", 2, memory) == b"234"
    assert memory == (b"234" if filesystem.is_local(store.url) else bytes(3))
    with pytest.raises(StorageError, match="got 1 of 3 bytes from offset 9"), retry_limit(1):
        store.read_into("deep/er/file", 9, memory)
    assert store.sizes("deep") == {"er/file": 10} and store.sizes("none") == {}
    assert store.exists("deep/er/file") and store.exists("deep") and not store.exists("deep/else")
    store.write("deep/er/file", b"new")
    assert store.read("deep/er/file") == b"new"


def test_folders_are_listed_walked_and_removed(store):
    for name in ("b", "a/2", "a/1", "a/c/3"):
        store.write(name, b"x")
    assert store.list() == ["a", "b"]
    assert store.list("a") == ["1", "2", "c"]
    assert store.walk() == ["a/1", "a/2", "a/c/3", "b"]
    assert store.walk("a") == ["a/1", "a/2", "a/c/3"]
    assert store.child("a").walk() == ["1", "2", "c/3"]
    store.remove("a")
    store.remove("absent")
    assert store.walk() == ["b"]


def test_an_absent_folder_is_empty(store):
    assert store.list("nothing") == [] and store.walk("nothing") == [] and not store.exists()


def test_create_writes_a_file_once(store):
    assert store.create("attempts/1", b"mine")
    assert not store.create("attempts/1", b"yours")
    assert store.read("attempts/1") == b"mine"


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP])
def test_create_without_hard_links_writes_a_file_once(tmp_path, monkeypatch, number):
    """FUSE and FAT answer a hard link with one of these."""

    def link(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", link)
    test_one_of_several_threads_creates_the_file(tmp_path)
    store = Store(str(tmp_path / "own"))
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(StorageError, match="The disk is full"):
        store.create("1", b"mine")
    assert os.listdir(tmp_path / "own") == []


def test_one_of_several_threads_creates_the_file(tmp_path):
    store = Store(str(tmp_path))
    for number in range(10):
        barrier, creators = threading.Barrier(4), []

        def race(thread, number=number, barrier=barrier, creators=creators):
            barrier.wait()
            if store.create(f"{number}", f"thread {thread}".encode()):
                creators.append(thread)

        threads = [threading.Thread(target=race, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(creators) == 1
        assert store.read(f"{number}") == f"thread {creators[0]}".encode()
    # No temporary file is left.
    assert sorted(os.listdir(tmp_path)) == sorted(str(number) for number in range(10))


def test_a_short_file_of_this_machine_is_read_once(tmp_path, monkeypatch):
    """Until 0.1.0 eight attempts waited half a minute for a file that does not grow."""
    monkeypatch.setattr(
        retry, "wait_random_exponential", lambda **_: lambda state: pytest.fail("waits")
    )
    store = filesystem.Store(str(tmp_path))
    store.write("file", b"0123")
    with pytest.raises(StorageError, match=r"got 4 of 10 bytes from offset 0\)\. The file is"):
        store.read("file", 0, 10)
    with pytest.raises(StorageError, match=r"got 2 of 3 bytes from offset 2\)\. The file is"):
        store.read_into("file", 2, memoryview(bytearray(3)))


def test_a_short_answer_is_an_error(store, monkeypatch):
    monkeypatch.setattr(retry, "wait_random_exponential", lambda **_: lambda state: 0)
    store.write("file", b"0123")
    with pytest.raises(StorageError, match="got 4 of 10 bytes from offset 0"):
        store.read("file", 0, 10)


def test_download_copies_selected_files(store, tmp_path):
    for name in ("config.json", "sub/a.json", "weights.bin"):
        store.write(name, name.encode())
    out = tmp_path / "out"
    assert store.download(str(out), lambda name: name.endswith(".json")) == [
        "config.json",
        "sub/a.json",
    ]
    assert (out / "sub" / "a.json").read_text() == "sub/a.json"
    assert not (out / "weights.bin").exists()


def test_download_refuses_names_that_leave_the_folder(tmp_path):
    hostile = f"memory://{uuid4().hex}"
    fs, path = filesystem.filesystem(hostile)
    fs.pipe_file(f"{path}/x", b"evil")
    MemoryFileSystem.store[f"{path}/a/../../evil.json"] = MemoryFileSystem.store.pop(f"{path}/x")
    with pytest.raises(
        StorageError,
        match=r"evil\.json: the name leaves the folder that files are copied to\. "
        r"Allowed: plain relative names\. Remove that file\.",
    ):
        Store(hostile).download(str(tmp_path / "in" / "side"))
    assert not list(tmp_path.rglob("evil.json"))


# Atomic writes


def test_a_reader_never_sees_part_of_a_file(tmp_path):
    store, stop, seen = Store(str(tmp_path)), threading.Event(), set()
    contents = [bytes([i]) * 2**20 for i in range(2)]
    store.write("file", contents[0])

    def read():
        while not stop.is_set():
            seen.add(store.read("file"))

    reader = threading.Thread(target=read)
    reader.start()
    for turn in range(30):
        store.write("file", contents[turn % 2])
    stop.set()
    reader.join()
    assert seen <= set(contents)


def test_a_killed_write_leaves_the_old_file(tmp_path):
    """The process is killed by a file-size limit in the middle of a write."""
    store = Store(str(tmp_path))
    store.write("file", b"old")
    program = (
        "import resource, signal; from dist_ft.storage.filesystem import Store\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_DFL)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        f"Store({str(tmp_path)!r}).write('file', b'new' * 10000)\n"
    )
    killed = subprocess.run(["python", "-c", program], capture_output=True)
    assert killed.returncode < 0
    assert store.read("file") == b"old"
    left = [name for name in os.listdir(tmp_path) if name != "file"]
    assert len(left) == 1 and left[0].startswith(".tmp-file-")
    assert store.list() == ["file"] and store.walk() == ["file"]
    assert (
        list(filesystem.glob(str(tmp_path)))
        == list(filesystem.glob(f"{tmp_path}/*"))
        == [str(tmp_path / "file")]
    )


def test_a_failed_write_leaves_no_file(tmp_path):
    (tmp_path / "file").mkdir()
    with pytest.raises(StorageError, match="IsADirectoryError"):
        Store(str(tmp_path)).write("file", b"x")
    with pytest.raises(StorageError, match="File name too long"):
        Store(str(tmp_path)).write("x" * 300, b"x")
    assert os.listdir(tmp_path) == ["file"]


# Errors and retries


def test_transient_errors_are_retried(flaky):
    store = flaky(OSError("connection reset"), TimeoutError())
    assert store.read("file") == b"0123456789"
    assert Flaky.calls == 3


def test_a_short_body_is_read_again(flaky, monkeypatch):
    store = flaky()
    whole, answers = MemoryFileSystem.cat_file, [b"01"]
    monkeypatch.setattr(
        MemoryFileSystem,
        "cat_file",
        lambda self, path, **kwargs: answers.pop() if answers else whole(self, path, **kwargs),
    )
    assert store.read("file", 0, 4) == b"0123"
    assert Flaky.calls == 2


def test_a_persistent_error_is_raised_once(flaky):
    store = flaky(*[OSError("503 SlowDown")] * 99)
    with pytest.raises(StorageError) as caught:
        store.read("file")
    assert str(caught.value) == (
        "flaky://bucket/file: cannot read it (OSError: 503 SlowDown). Gave up after 8 attempts. "
        "Check that the endpoint answers."
    )
    assert Flaky.calls == retry.DEFAULT_ATTEMPTS == 8
    assert caught.value.retryable


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (FileNotFoundError("file"), "This file or bucket does not exist. Check the URL."),
        (
            PermissionError("403"),
            "Access is denied. Check credentials (in the environment) and permissions.",
        ),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            "The disk is full. Free some space or keep fewer checkpoints (checkpoint.keep_last).",
        ),
        (
            OSError(errno.EDQUOT, "Disk quota exceeded"),
            "The disk is full. Free some space or keep fewer checkpoints (checkpoint.keep_last).",
        ),
        (
            OSError(errno.EROFS, "Read-only file system"),
            "Access is denied. Check credentials (in the environment) and permissions.",
        ),
        (
            ValueError("bad option"),
            "A retry would not help. Check the URL and storage.options.",
        ),
        (
            RuntimeError("Unable to locate credentials"),
            "No credentials were found. Set them in the environment.",
        ),
    ],
)
def test_other_errors_are_raised_without_a_retry(flaky, error, advice):
    store = flaky(error)
    with pytest.raises(StorageError, match=re.escape(advice)):
        store.read("file")
    assert Flaky.calls == 1


def test_errors_name_the_url_without_credentials(flaky, monkeypatch):
    monkeypatch.setenv("SOME_SECRET_TOKEN", "hunter2hunter2")
    store = flaky(
        PermissionError("hunter2hunter2 is not allowed"), url="flaky://me:pa55word@bucket"
    )
    with pytest.raises(StorageError) as caught:
        store.read("file")
    assert str(caught.value).startswith(
        "flaky://<redacted>@bucket/file: cannot read it (PermissionError: "
        "<SOME_SECRET_TOKEN> is not allowed)"
    )
    assert (
        "pa55word" not in repr(store) + store.redacted_url("file")
        and store.redacted_url("f") == "flaky://<redacted>@bucket/f"
    )


def test_an_unknown_protocol_is_an_error():
    with pytest.raises(
        StorageError, match=r"nosuch://x/y: cannot read it \(ValueError: Protocol not known"
    ):
        Store("nosuch://x").read("y")


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StorageError, match=r"file/run/x: cannot write it \(NotADirectoryError"):
        Store(str(tmp_path / "file" / "run")).write("x", b"")


def test_a_silent_host_is_given_up_and_not_contacted_again(monkeypatch):
    """A user waits for one timeout, not for one per call."""
    requests, never = [], threading.Event()
    monkeypatch.setattr(
        filesystem, "filesystem", lambda url: (requests.append(url), never.wait(30))
    )
    start = time.monotonic()
    with retry_limit(2, timeout_s=0.2):
        for path, reason in (
            ("a", "no answer within 0.2 s"),
            ("b", "s3://silent did not answer before"),
        ):
            with pytest.raises(
                StorageError,
                match=rf"s3://silent/{path}: cannot read it \(NoAnswerError: {reason}\)\. Check the "
                r"endpoint \(storage.options, proxies, firewalls\), or try again later",
            ):
                Store("s3://silent").read(path)
    assert requests == ["s3://silent/a"] and time.monotonic() - start < 5
    never.set()


@pytest.mark.parametrize("method", ["write", "create"])
@pytest.mark.parametrize(
    ("failpoint", "is_written"),
    [
        ("storage.before_write.attempts", False),
        ("storage.before_publish", False),
        ("storage.after_write.attempts", True),
    ],
)
def test_failpoint_before_or_after_a_write(tmp_path, monkeypatch, method, failpoint, is_written):
    store = Store(str(tmp_path))
    monkeypatch.setenv("DIST_FT_FAILPOINT", f"{failpoint}:*!raise")
    with pytest.raises((RuntimeError, StorageError)):
        getattr(store, method)("attempts/000001.json", b"{}")
    assert store.list("attempts") == (["000001.json"] if is_written else [])
