"""A run that started from another run: what it recorded is used, derived again, or refused."""

from __future__ import annotations

import pytest
from unit.small import run_config, save

from dist_ft.checkpoint import initial_weights
from dist_ft.checkpoint.initial_weights import INITIAL_CHECKPOINT
from dist_ft.checkpoint.stored_files import store_model_files
from dist_ft.core.errors import CheckpointError


@pytest.mark.parametrize("content", [b"", b'{"step": 3', b"[3]", b"{}", b'{"step": "3"}', b"null"])
def test_fault_26_a_damaged_record_is_refused_in_one_line(store, content):
    store.write(INITIAL_CHECKPOINT, content)
    with pytest.raises(CheckpointError, match=r"began.json: the file is damaged") as caught:
        initial_weights._recorded_step(store)
    assert "\n" not in str(caught.value)


def test_fault_26_a_lost_model_folder_is_derived_again(store, attempt, engine):
    """Not refused as a run that has not started to train."""
    config = run_config(store.url)
    store.write(INITIAL_CHECKPOINT, b'{"run": "other", "step": 3}')
    store_model_files(store, {"config.json": b"{}"})
    assert not initial_weights._has_own_model(config, store), "no checkpoint yet"

    save(attempt(), engine, 1)
    assert initial_weights._has_own_model(config, store)

    store.remove("model")
    assert not initial_weights._has_own_model(config, store)


def test_fault_26_a_run_without_its_config_is_still_a_run(store, attempt, engine):
    assert not initial_weights.is_run(store.url)
    save(attempt(), engine, 1)
    assert initial_weights.is_run(store.url)
