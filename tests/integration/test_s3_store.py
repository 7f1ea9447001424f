"""The same store over HTTP: an S3 server on loopback (moto), through `storage.options` as a config sets them."""

from __future__ import annotations

import time
from uuid import uuid4

import fsspec
import pytest
from s3 import BUCKET, server
from unit.small import checkpoints, make_engine, save, tensors_of, train

from dist_ft.checkpoint.discovery import start_attempt
from dist_ft.checkpoint.manager import CheckpointManager
from dist_ft.core.errors import StorageError
from dist_ft.core.world import Collectives, World
from dist_ft.storage import filesystem, glob_pages, s3_pages
from dist_ft.storage.filesystem import Store

pytest.importorskip("s3fs", reason="needs s3fs (the extra `s3`)")
pytest.importorskip("moto.server", reason="needs moto[server] (the extra `dev`)")


@pytest.fixture(scope="module")
def endpoint():
    """The URL of an S3 server of our own, with a bucket."""
    with server() as port:
        yield f"http://127.0.0.1:{port}"


@pytest.fixture(autouse=True)
def s3(endpoint, monkeypatch):
    """Credentials in the environment, the endpoint by config; what was configured is forgotten afterwards."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing-testing")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setattr(fsspec.config, "conf", {})
    filesystem.configure({"s3": {"endpoint_url": endpoint}})


@pytest.fixture
def store():
    return Store(f"s3://{BUCKET}/{uuid4().hex}")


def test_files_and_ranges(store):
    content = bytes(range(256)) * 40_000
    store.write("deep/file", content)
    assert store.read("deep/file") == content
    assert store.read("deep/file", 5, 9) == content[5:9]
    assert store.sizes("deep") == {"file": len(content)}
    with pytest.raises(StorageError, match="got 5 of 100 bytes"):
        store.read("deep/file", len(content) - 5, len(content) + 95)


def test_folders(store):
    assert store.list() == store.walk() == [] and not store.exists()
    for name in ("b", "a/2", "a/c/3"):
        store.write(name, b"x")
    assert (store.list(), store.list("a"), store.walk()) == (
        ["a", "b"],
        ["2", "c"],
        ["a/2", "a/c/3", "b"],
    )
    assert store.exists("a") and store.exists("a/2") and not store.exists("a/1")
    store.remove("a")
    store.remove("a")
    assert store.walk() == ["b"]


def test_writes_of_other_processes_are_visible_at_once(store):
    """Listings are not cached: another worker's attempt or commit must show."""
    assert store.list("attempts") == []
    Store(store.url).write("attempts/1", b"x")
    assert store.list("attempts") == ["1"]


def test_create_is_exclusive(store):
    assert store.create("attempt", b"mine")
    assert not store.create("attempt", b"yours")
    assert store.read("attempt") == b"mine"


def test_glob_and_stat(store):
    for name in ("data/a.jsonl", "data/b.jsonl", "data/deep/c.jsonl"):
        store.write(name, b"one")
    assert list(filesystem.glob(store.full_url("data/*.jsonl"))) == [
        store.full_url("data/a.jsonl"),
        store.full_url("data/b.jsonl"),
    ]
    assert list(filesystem.glob(store.full_url("data"))) == [
        store.full_url(name) for name in ("data/a.jsonl", "data/b.jsonl", "data/deep/c.jsonl")
    ]
    assert list(filesystem.glob(store.full_url("data/a.jsonl"))) == [store.full_url("data/a.jsonl")]
    assert (
        list(filesystem.glob(store.full_url("none")))
        == list(filesystem.glob(store.full_url("none/*")))
        == []
    )
    before = filesystem.stat(store.full_url("data/a.jsonl"))
    assert before["size"] == 3 and before["version"] != "None"
    store.write("data/a.jsonl", b"two")
    assert filesystem.stat(store.full_url("data/a.jsonl")) != before


def test_download(store, tmp_path):
    store.write("config.json", b"{}")
    store.write("sub/x.json", b"[]")
    assert store.download(str(tmp_path)) == ["config.json", "sub/x.json"]
    assert (tmp_path / "sub" / "x.json").read_bytes() == b"[]"


def test_missing_files_and_buckets_are_reported_at_once(store):
    for url in (store, Store("s3://no-such-bucket-anywhere")):
        started = time.monotonic()
        with pytest.raises(
            StorageError,
            match=rf"^{url.url}/absent: cannot read it \(FileNotFoundError: .*\)\. This "
            r"file or bucket does not exist\. Check the URL\.$",
        ):
            url.read("absent")
        assert time.monotonic() - started < 5


def test_no_credentials(store, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    filesystem.configure({"s3": {"skip_instance_cache": True}})
    with pytest.raises(
        StorageError, match=r"No credentials were found\. Set them in the environment"
    ):
        store.read("x")


def test_a_checkpoint_is_saved_and_restored(store):
    engine = make_engine()
    train(engine, range(2))
    manager = CheckpointManager(
        store, checkpoints(), World(), Collectives(), start_attempt(store, 1)
    )
    assert save(manager, engine, 2) == store.full_url("checkpoints/step-000000002-a0001")
    want = train(engine, range(2, 4))
    other = make_engine()
    manager.load(manager.find_latest(), other, tensors_of(other))
    assert train(other, range(2, 4)) == want


@pytest.mark.parametrize(
    "pattern",
    [
        "data",
        "data/",
        "data/part-*.jsonl",
        "data/part-1?.jsonl",
        "data/*/*.jsonl",
        "data/**/*.jsonl",
        "data/part-1[0-2].jsonl",
        "data/odd[1].jsonl",
        "data/part-03.jsonl",
        "none",
        "none/*",
    ],
)
def test_pages_list_what_one_listing_lists(store, monkeypatch, pattern):
    monkeypatch.setattr(s3_pages, "PAGE_KEYS", 5)
    monkeypatch.setattr(s3_pages, "MAX_PAGES_IN_TURN", 2)
    names = [f"part-{number:02d}.jsonl" for number in range(23)]
    names += ["deep/a.jsonl", "deep/deeper/b.jsonl", "odd[1].jsonl", "_SUCCESS", ".tmp-x"]
    for name in names:
        store.write(f"data/{name}", name.encode())

    url = store.full_url(pattern)
    pages = list(glob_pages.iter_glob(url))
    found = {name: info for page in pages for name, info in page.items()}
    expected = filesystem.glob(url)
    assert list(found.items()) == list(expected.items())
    if pattern == "data":
        assert len(pages) > 2 and len(found) == 27


def test_a_page_that_fails_is_retried_by_itself(store, monkeypatch):
    monkeypatch.setattr(s3_pages, "PAGE_KEYS", 2)
    for number in range(9):
        store.write(f"data/{number}.jsonl", b"x")
    direct, calls = s3_pages.list_page, []

    def failing(*values):
        calls.append(values)
        if len(calls) == 3:
            raise ConnectionResetError("reset")
        return direct(*values)

    monkeypatch.setattr(s3_pages, "list_page", failing)
    found = [name for page in glob_pages.iter_glob(store.full_url("data")) for name in page]
    assert len(found) == 9
