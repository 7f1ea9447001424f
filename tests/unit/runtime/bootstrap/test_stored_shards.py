"""The table of a run's shards is stored once and copied to each node."""

from __future__ import annotations

import pytest

from dist_ft.core.errors import DataError
from dist_ft.data.sources.discovery import Shard
from dist_ft.runtime.bootstrap.stored_shards import open_shards, store_shards, write_shards
from dist_ft.storage.filesystem import Store

SHARDS = [Shard("a.jsonl", "jsonl", 3, "1"), Shard("b.jsonl", "jsonl", 4, "2")]


@pytest.fixture
def store(tmp_path):
    return Store(str(tmp_path / "run"))


@pytest.fixture
def checksum(tmp_path, store):
    folder = tmp_path / "node-0"
    folder.mkdir()
    checksum = write_shards([SHARDS], folder)
    store_shards(store, "data/x", folder, checksum)
    assert [path.name for path in folder.iterdir()] == [f"{checksum}.arrow"]
    return checksum


def test_another_node_copies_the_table_once(tmp_path, store, checksum):
    folder = tmp_path / "node-1"
    folder.mkdir()
    assert list(open_shards(store, "data/x", folder, checksum).iter_source(0)) == SHARDS
    store.remove("data/x.arrow")
    assert len(open_shards(store, "data/x", folder, checksum)) == 2
    assert {path.suffix for path in folder.iterdir()} <= {".arrow", ".lock"}


def test_a_missing_or_damaged_table_is_refused(tmp_path, store, checksum):
    folder = tmp_path / "node-1"
    folder.mkdir()
    store.write("data/x.arrow", b"other")
    with pytest.raises(DataError, match=r"x\.arrow: the table of the run's shards is damaged"):
        open_shards(store, "data/x", folder, checksum)
    store.remove("data/x.arrow")
    with pytest.raises(DataError, match=r"x\.arrow: the table of the run's shards is missing"):
        open_shards(store, "data/x", folder, checksum)
