"""The stored description of a stream."""

from __future__ import annotations

import json

import pytest

from dist_ft.core.errors import DataError
from dist_ft.data.blocks import stream_file
from dist_ft.data.blocks.stream_file import StreamDescription, StreamedSource
from dist_ft.data.sampling.stream_order import StreamLayout
from dist_ft.storage.filesystem import Store

DESCRIPTION = StreamDescription(
    sources=(StreamedSource.from_layout(1, StreamLayout(1000, 10, 2)),),
    table="0" * 32,
    sizes=(4.0, 20.5),
    recipe={"encoder": "e", "pack": True},
)


@pytest.fixture
def store(tmp_path):
    return Store(str(tmp_path))


def test_a_description_comes_back(store):
    assert stream_file.load(store, "x") is None
    stream_file.save(DESCRIPTION, store, "x")
    found = stream_file.load(store, "x")
    assert found == DESCRIPTION
    assert found.layouts == {1: StreamLayout(1000, 10, 2)}


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{}", b'{"sources": 3}', b'{"sources": [], "table": "../x"}', b"\xff"],
)
def test_a_damaged_description_is_one_clear_line(store, content):
    store.write("x.json", content)
    with pytest.raises(
        DataError, match=r"x\.json: the stored description of the stream is damaged"
    ):
        stream_file.load(store, "x")


def test_absurd_numbers_are_refused(store):
    document = DESCRIPTION.model_dump(mode="json")
    document["sources"][0]["num_blocks"] = 2**40
    store.write("x.json", json.dumps(document).encode())
    with pytest.raises(DataError, match="is damaged"):
        stream_file.load(store, "x")


def test_a_newer_version_is_named(store):
    store.write("x.json", b'{"format_version": 9}')
    with pytest.raises(DataError, match=r"has format 9\. This version reads format 1. Update"):
        stream_file.load(store, "x")


def test_another_recipe_is_refused():
    recipe = {"encoder": "other", "pack": True}
    with pytest.raises(DataError, match=r"encoder was e, is other"):
        stream_file.verify_recipe(DESCRIPTION, recipe)
    stream_file.verify_recipe(DESCRIPTION, {"encoder": "e", "pack": True})
