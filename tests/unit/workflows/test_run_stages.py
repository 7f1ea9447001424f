"""The stored state of a sequence of stages: read as it was written, or refused in one line."""

from __future__ import annotations

import pytest

from dist_ft.core.errors import CheckpointError
from dist_ft.storage.filesystem import Store
from dist_ft.workflows import run_stages


def test_no_state_is_stored_before_the_first_stage(tmp_path):
    assert run_stages._read_states(Store(str(tmp_path))) == []


@pytest.mark.parametrize(
    "content", [b"", b'{"stages": [', b"[]", b"null", b'{"stages": {}}', b"{}"]
)
def test_fault_26_a_damaged_state_is_refused_in_one_line(tmp_path, content):
    store = Store(str(tmp_path))
    store.write(run_stages.STATE, content)
    with pytest.raises(CheckpointError, match=r"stages.json: the file is damaged") as caught:
        run_stages._read_states(store)
    assert "\n" not in str(caught.value)
