"""URLs of files, globs and folders; size and version of a file."""

from __future__ import annotations

from uuid import uuid4

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem

from dist_ft.core.errors import StorageError
from dist_ft.storage import filesystem
from dist_ft.storage.filesystem import Store


def test_local_urls(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert [
        filesystem.is_local(url) for url in ("x", "/x", "file:///x", "s3://x", "memory://x")
    ] == [
        True,
        True,
        True,
        False,
        False,
    ]
    assert (
        Store("~/runs").url
        == Store("runs").url
        == Store(f"file://{tmp_path}/runs/").url
        == str(tmp_path / "runs")
    )
    assert Store("s3://bucket/runs/").full_url("a/b") == "s3://bucket/runs/a/b"


@pytest.mark.parametrize("kind", ["local", "memory"])
def test_glob_finds_files_globs_and_folders(kind, tmp_path):
    root = str(tmp_path) if kind == "local" else f"memory://{uuid4().hex}"
    store = Store(root)
    for name in ("data/b.jsonl", "data/a.jsonl", "data/sub/c.jsonl", "odd[1].txt"):
        store.write(name, b"x")

    def full(name):  # fsspec spells memory://x as memory:///x
        return (
            store.full_url(name) if kind == "local" else store.full_url(name).replace("//", "///")
        )

    assert list(filesystem.glob(full("data/a.jsonl"))) == [full("data/a.jsonl")]
    assert list(filesystem.glob(full("data/*"))) == [full("data/a.jsonl"), full("data/b.jsonl")]
    assert list(filesystem.glob(full("data"))) == [
        full("data/a.jsonl"),
        full("data/b.jsonl"),
        full("data/sub/c.jsonl"),
    ]
    assert list(filesystem.glob(full("**/c.jsonl"))) == [full("data/sub/c.jsonl")]
    assert list(filesystem.glob(full("odd[1].txt"))) == [full("odd[1].txt")]
    assert list(filesystem.glob(full("nothing"))) == list(filesystem.glob(full("nothing/*"))) == []


@pytest.mark.parametrize("kind", ["local", "memory"])
def test_stat_changes_with_the_content(kind, tmp_path):
    store = Store(str(tmp_path) if kind == "local" else f"memory://{uuid4().hex}")
    store.write("shard", b"one")
    before = filesystem.stat(store.full_url("shard"))
    assert before["size"] == 3 and before == filesystem.stat(store.full_url("shard"))
    store.write("shard", b"two")
    assert filesystem.stat(store.full_url("shard")) != before
    with pytest.raises(StorageError, match="This file or bucket does not exist"):
        filesystem.stat(store.full_url("absent"))


def test_configure_sets_options_of_a_protocol(monkeypatch):
    monkeypatch.setattr(fsspec.config, "conf", {})
    filesystem.configure({"file": {"auto_mkdir": True}})
    filesystem.configure({"file": {"skip_instance_cache": True}})
    assert fsspec.config.conf["file"] == {"auto_mkdir": True, "skip_instance_cache": True}
    assert isinstance(filesystem.filesystem("x")[0], LocalFileSystem)


def test_pyarrow_reads_through_the_fsspec_filesystem():
    store = Store(f"memory://{uuid4().hex}")
    store.write("file", b"through arrow")
    arrow_fs, path = filesystem.arrow_filesystem(store.full_url("file"))
    assert arrow_fs.open_input_file(path).read() == b"through arrow"
