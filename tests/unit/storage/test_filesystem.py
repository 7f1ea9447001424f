"""One door to storage: whole writes, exclusive creation, retries only where they help, and one clear error."""

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
    """A store on a folder, at a file:// URL, and in memory: the same behaviour is asked of each."""
    url = {
        "path": str(tmp_path / "s"),
        "file": f"file://{tmp_path}/s",
        "memory": f"memory://{uuid4().hex}/s",
    }
    return Store(url[request.param])


class Flaky(MemoryFileSystem):
    """A filesystem that fails as often as a test says before it works."""

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
    """Return a function: the errors the next reads meet -> a store on a filesystem that raises them."""
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    monkeypatch.setattr(retry, "wait_random_exponential", lambda **_: lambda state: 0)

    def prepare(*failures, url="flaky://bucket"):
        Flaky.failures, Flaky.calls = list(failures), 0
        Flaky().pipe_file("/bucket/file", b"0123456789")
        return Store(url)

    return prepare


# What a store does


def test_files_come_back_whole_and_in_ranges(store):
    store.write("deep/er/file", b"0123456789")
    assert store.read("deep/er/file") == b"0123456789"
    assert store.read("deep/er/file", 2, 5) == b"234"
    assert store.read("deep/er/file", 7) == b"789"
    memory = memoryview(bytearray(3))
    assert store.read_into("deep/er/file", 2, memory) == b"234"
    assert memory == (b"234" if filesystem.is_local(store.url) else bytes(3))
    with pytest.raises(StorageError, match="1 bytes came, 3 were asked for from 9"), retry_limit(1):
        store.read_into("deep/er/file", 9, memory)
    assert store.sizes("deep") == {"er/file": 10} and store.sizes("none") == {}
    assert store.exists("deep/er/file") and store.exists("deep") and not store.exists("deep/else")
    store.write("deep/er/file", b"new")
    assert store.read("deep/er/file") == b"new"


def test_folders_list_walk_and_vanish(store):
    for name in ("b", "a/2", "a/1", "a/c/3"):
        store.write(name, b"x")
    assert store.list() == ["a", "b"]
    assert store.list("a") == ["1", "2", "c"]
    assert store.walk() == ["a/1", "a/2", "a/c/3", "b"]
    assert store.walk("a") == ["a/1", "a/2", "a/c/3"]
    assert store.child("a").walk() == ["1", "2", "c/3"]
    store.remove("a")
    store.remove("never there")
    assert store.walk() == ["b"]


def test_an_absent_folder_is_empty(store):
    assert store.list("nothing") == [] and store.walk("nothing") == [] and not store.exists()


def test_create_makes_a_file_once(store):
    assert store.create("attempts/1", b"mine")
    assert not store.create("attempts/1", b"yours")
    assert store.read("attempts/1") == b"mine"


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP])
def test_a_folder_without_hard_links_makes_a_file_once_too(tmp_path, monkeypatch, number):
    """FUSE and FAT answer a hard link with one of these."""

    def link(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", link)
    test_of_many_threads_one_creates(tmp_path)
    store = Store(str(tmp_path / "own"))
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(StorageError, match="the disk is full"):
        store.create("1", b"mine")
    assert os.listdir(tmp_path / "own") == []


def test_of_many_threads_one_creates(tmp_path):
    store = Store(str(tmp_path))
    for number in range(10):
        barrier, made = threading.Barrier(4), []

        def race(thread, number=number, barrier=barrier, made=made):
            barrier.wait()
            if store.create(f"{number}", f"thread {thread}".encode()):
                made.append(thread)

        threads = [threading.Thread(target=race, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(made) == 1
        assert store.read(f"{number}") == f"thread {made[0]}".encode()
    assert sorted(os.listdir(tmp_path)) == sorted(
        str(number) for number in range(10)
    )  # and nothing temporary


def test_short_answers_are_errors(store, monkeypatch):
    monkeypatch.setattr(retry, "wait_random_exponential", lambda **_: lambda state: 0)
    store.write("file", b"0123")
    with pytest.raises(StorageError, match=r"4 bytes came, 10 were asked for from 0"):
        store.read("file", 0, 10)


def test_download_copies_what_is_wanted(store, tmp_path):
    for name in ("config.json", "sub/a.json", "weights.bin"):
        store.write(name, name.encode())
    out = tmp_path / "out"
    assert store.download(str(out), lambda name: name.endswith(".json")) == [
        "config.json",
        "sub/a.json",
    ]
    assert (out / "sub" / "a.json").read_text() == "sub/a.json"
    assert not (out / "weights.bin").exists()


def test_download_refuses_names_that_lead_out(tmp_path):
    hostile = f"memory://{uuid4().hex}"
    fs, path = filesystem.filesystem(hostile)
    fs.pipe_file(f"{path}/x", b"evil")
    MemoryFileSystem.store[f"{path}/a/../../evil.json"] = MemoryFileSystem.store.pop(f"{path}/x")
    with pytest.raises(
        StorageError,
        match=r"evil\.json: the name leads out of the folder it would be copied to; "
        r"plain relative names are allowed; remove that file",
    ):
        Store(hostile).download(str(tmp_path / "in" / "side"))
    assert not list(tmp_path.rglob("evil.json"))


# Whole or not at all


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


def test_a_write_that_dies_leaves_the_old_file(tmp_path):
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


def test_a_write_that_fails_leaves_nothing(tmp_path):
    (tmp_path / "file").mkdir()
    with pytest.raises(StorageError, match="IsADirectoryError"):
        Store(str(tmp_path)).write("file", b"x")
    with pytest.raises(StorageError, match="File name too long"):
        Store(str(tmp_path)).write("x" * 300, b"x")
    assert os.listdir(tmp_path) == ["file"]


# Errors and retries


def test_transient_trouble_is_tried_again(flaky):
    store = flaky(OSError("connection reset"), TimeoutError())
    assert store.read("file") == b"0123456789"
    assert Flaky.calls == 3


def test_a_short_body_is_fetched_again(flaky, monkeypatch):
    store = flaky()
    whole, answers = MemoryFileSystem.cat_file, [b"01"]
    monkeypatch.setattr(
        MemoryFileSystem,
        "cat_file",
        lambda self, path, **kwargs: answers.pop() if answers else whole(self, path, **kwargs),
    )
    assert store.read("file", 0, 4) == b"0123"
    assert Flaky.calls == 2


def test_lasting_trouble_is_one_error(flaky):
    store = flaky(*[OSError("503 SlowDown")] * 99)
    with pytest.raises(StorageError) as caught:
        store.read("file")
    assert str(caught.value) == (
        "flaky://bucket/file: can not read it (OSError: 503 SlowDown); gave up after 8 tries; "
        "check that the endpoint answers"
    )
    assert Flaky.calls == retry.DEFAULT_ATTEMPTS == 8
    assert caught.value.retryable


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (FileNotFoundError("file"), "there is no such file or bucket; check the URL"),
        (
            PermissionError("403"),
            "access is refused; check credentials (in the environment) and permissions",
        ),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            "the disk is full; free some space or keep fewer checkpoints (checkpoint.keep_last)",
        ),
        (
            OSError(errno.EDQUOT, "Disk quota exceeded"),
            "the disk is full; free some space or keep fewer checkpoints (checkpoint.keep_last)",
        ),
        (
            OSError(errno.EROFS, "Read-only file system"),
            "access is refused; check credentials (in the environment) and permissions",
        ),
        (
            ValueError("bad option"),
            "trying again would not help; check the URL and storage.options",
        ),
        (
            RuntimeError("Unable to locate credentials"),
            "no credentials were found; set them in the environment",
        ),
    ],
)
def test_what_trying_again_does_not_cure_is_said_at_once(flaky, error, advice):
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
        "flaky://<redacted>@bucket/file: can not read it (PermissionError: "
        "<SOME_SECRET_TOKEN> is not allowed)"
    )
    assert (
        "pa55word" not in repr(store) + store.shown("file")
        and store.shown("f") == "flaky://<redacted>@bucket/f"
    )


def test_a_protocol_without_its_package_or_name():
    with pytest.raises(
        StorageError, match=r"nosuch://x/y: can not read it \(ValueError: Protocol not known"
    ):
        Store("nosuch://x").read("y")


def test_a_folder_that_can_not_be_written(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StorageError, match=r"file/run/x: can not write it \(NotADirectoryError"):
        Store(str(tmp_path / "file" / "run")).write("x", b"")


def test_a_place_that_does_not_answer_is_given_up_and_not_asked_again(monkeypatch):
    """For who waits at a terminal: one bound for a call, and none at all for the next to the same place."""
    asked, never = [], threading.Event()
    monkeypatch.setattr(filesystem, "filesystem", lambda url: (asked.append(url), never.wait(30)))
    begun = time.monotonic()
    with retry_limit(2, timeout_s=0.2):
        for path, said in (
            ("a", "no answer within 0.2 s"),
            ("b", "s3://silent did not answer before"),
        ):
            with pytest.raises(
                StorageError,
                match=rf"s3://silent/{path}: can not read it \(NoAnswerError: {said}\); check the "
                r"endpoint \(storage.options, proxies, firewalls\), or try again later",
            ):
                Store("s3://silent").read(path)
    assert asked == ["s3://silent/a"] and time.monotonic() - begun < 5
    never.set()
