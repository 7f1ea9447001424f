"""Files of JSON that a run stored: read, or refused in one line."""

from __future__ import annotations

import pytest

from dist_ft.core.errors import CheckpointError, StorageError
from dist_ft.storage.filesystem import Store
from dist_ft.storage.stored_json import read_stored_json


@pytest.fixture
def store(tmp_path):
    return Store(str(tmp_path))


def test_content_of_the_expected_kind_is_returned(store):
    store.write("a", b'{"b": [1]}')
    store.write("l", b"[1, 2]")
    assert read_stored_json(store, "a", dict, "") == {"b": [1]}
    assert read_stored_json(store, "l", list, "") == [1, 2]


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"7", b"null", b"\xff\xfe", b"[" * 9999])
def test_fault_26_other_content_is_refused_in_one_line(store, content):
    store.write("a", content)
    with pytest.raises(
        CheckpointError, match=r"/a: the file is damaged \(.+\)\. Do this\.$"
    ) as caught:
        read_stored_json(store, "a", dict, "Do this.")
    assert "\n" not in str(caught.value) and not caught.value.retryable


def test_a_missing_file_is_an_error_of_the_storage(store):
    with pytest.raises(StorageError, match="does not exist"):
        read_stored_json(store, "a", dict, "")
