"""Which checkpoint is the latest, and what is said when a later one has vanished."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
from unit.small import checkpoints, make_engine, save, tensors_of, train

from dist_ft.checkpoint import discovery, manifest
from dist_ft.checkpoint.discovery import list_committed, load_manifest, start_attempt
from dist_ft.checkpoint.manager import CheckpointManager
from dist_ft.checkpoint.manifest import NewerFormatError
from dist_ft.checkpoint.trained_model import find_best, find_manifest
from dist_ft.core.errors import CheckpointError
from dist_ft.core.world import Collectives, World
from dist_ft.storage.filesystem import Store


def attempt_with_number(store: Store, number: int) -> CheckpointManager:
    """Return the manager of an attempt with any number, as a version numbers it that forgot some."""
    store.write(f"attempts/{number:06d}.json", json.dumps({"token": f"t{number}"}).encode())
    return CheckpointManager(store, checkpoints(keep_last=9), World(), Collectives(), number)


@pytest.fixture
def reset(store, engine, monkeypatch):
    """A run whose third attempt was number 1 again, as 0.1.0 did once `attempts/` was lost.

    Attempts 1 and 2 committed steps 2, 4 and 6; the third one continued from there to 8 and 10.
    """
    monkeypatch.setattr(discovery.attempts, "latest_attempt", lambda _: 0)
    for number, steps in ((1, (2,)), (2, (4, 6)), (1, (8, 10))):
        manager = attempt_with_number(store, number)
        manager.find_latest()
        for step in steps:
            save(manager, engine, step, np.zeros((0, 6), np.int64))
        store.remove("attempts")
    monkeypatch.undo()
    return store


def test_finding_4_later_checkpoints_with_a_lower_number_are_not_hidden(reset):
    assert [name[5:] for name in list_committed(reset)] == [
        "000000010-a0001",
        "000000008-a0001",
        "000000006-a0002",
        "000000004-a0002",
        "000000002-a0001",
    ]
    assert find_manifest(reset, None).progress.step == 10


def test_finding_4_such_a_run_continues_under_a_number_of_its_own(reset):
    engine = make_engine()
    number = start_attempt(reset, 1)
    manager = CheckpointManager(reset, checkpoints(keep_last=2), World(), Collectives(), number)
    found = manager.find_latest()
    assert (number, found.progress.step) == (3, 10)
    assert manager.load(found, engine, tensors_of(engine)).progress.step == 10
    save(manager, engine, 12)
    assert list_committed(reset) == ["step-000000012-a0003", "step-000000010-a0001"]


def test_finding_4_their_order_stays_right_before_older_ones_are_removed(reset):
    manager = CheckpointManager(
        reset, checkpoints(keep_last=9), World(), Collectives(), start_attempt(reset, 1)
    )
    manager.find_latest()
    save(manager, make_engine(), 12)
    steps = [manifest.parse_folder(name).step for name in list_committed(reset)]
    assert steps == [12, 10, 8, 6, 4, 2]


def test_damage_to_such_a_checkpoint_leads_to_the_one_before_it(reset, caplog):
    name = list_committed(reset)[0]
    path = f"checkpoints/{name}/rank-00000-0000.safetensors"
    reset.write(path, reset.read(path)[:-1])
    with caplog.at_level(logging.WARNING, "dist_ft"):
        assert find_manifest(reset, None).progress.step == 8
    assert f"checkpoint {name} is skipped" in caplog.text


def test_no_manifest_is_read_to_order_checkpoints_of_a_run_without_a_reset(
    store, attempt, engine, monkeypatch
):
    for step in (1, 2, 3):
        save(attempt(), engine, step)
    monkeypatch.setattr(Store, "read", lambda *_: pytest.fail("read"))
    assert [name[-5:] for name in list_committed(store)] == ["a0003", "a0002", "a0001"]


# Checkpoints that vanished


def test_fault_26_a_run_whose_checkpoints_were_removed_does_not_start_over(store, attempt, engine):
    one = attempt()
    save(one, engine, 2)
    save(one, engine, 4)
    store.remove("checkpoints")
    with pytest.raises(
        CheckpointError,
        match=r"/checkpoints: holds no checkpoint, but one of step 2 was committed\. Restore the "
        r"folder from a copy, or move the run's folder away to start again\.",
    ):
        attempt()


def test_fault_26_the_loss_of_the_very_last_checkpoint_is_logged(store, attempt, engine, caplog):
    one = attempt()
    for step in (2, 4):
        save(one, engine, step)
    store.write("time/000001.json", b'{"committed": 4}')  # as the time ledger notes it
    store.remove("checkpoints/step-000000004-a0001")
    with caplog.at_level(logging.WARNING, "dist_ft"):
        assert attempt().latest_step == 2
    assert "the checkpoint of step 4 was committed and is missing" in caplog.text


@pytest.mark.parametrize("content", [b"", b"[1]", b'{"committed": "x"}', b'{"committed": null}'])
def test_a_damaged_time_record_shows_no_loss(store, attempt, engine, caplog, content):
    save(attempt(), engine, 2)
    store.write("time/000001.json", content)
    with caplog.at_level(logging.WARNING, "dist_ft"):
        assert attempt().latest_step == 2
    assert caplog.text == ""


def test_fault_26_a_torn_first_save_is_no_lost_checkpoint(store, attempt, engine):
    save(attempt(), engine, 2)
    store.remove("checkpoints")  # its ledger is written before its manifest
    assert attempt().latest_step == 0


def test_fault_26_the_loss_of_the_latest_checkpoint_is_logged(store, attempt, engine, caplog):
    one = attempt()
    for step in (2, 4, 6):
        save(one, engine, step)
    for step in (4, 6):
        store.remove(f"checkpoints/step-{step:09d}-a0001")
    with caplog.at_level(logging.WARNING, "dist_ft"):
        assert attempt().latest_step == 2
    assert (
        "the checkpoint of step 4 was committed and is missing; the latest there is, of step 2, is "
        "used" in caplog.text
    )


def test_nothing_is_logged_of_steps_that_a_later_attempt_repeated(store, attempt, engine, caplog):
    one = attempt()
    for step in (2, 4, 6):
        save(one, engine, step)
    for step in (4, 6):
        path = f"checkpoints/step-{step:09d}-a0001/rank-00000-0000.safetensors"
        store.write(path, b"")
    save(attempt(), engine, 3)
    caplog.clear()  # of the reason why the damaged ones were skipped
    with caplog.at_level(logging.WARNING, "dist_ft"):
        assert attempt().latest_step == 3
    assert caplog.text == ""


def test_fault_26_a_lost_ledger_is_logged_once_and_the_run_continues(
    store, attempt, engine, caplog
):
    save(attempt(), engine, 2)
    store.remove("ledger")
    two = attempt()
    with caplog.at_level(logging.WARNING, "dist_ft"):
        save(two, engine, 4)
        save(two, engine, 6)
    assert caplog.text.count("cannot prove the history any more") == 1
    assert attempt().latest_step == 6


# Newer formats


@pytest.mark.parametrize("valid", ["whole", "other fields", "other checksum"])
def test_a_manifest_of_a_newer_format_is_never_damaged(store, attempt, engine, valid):
    one = attempt()
    save(one, engine, 1)
    save(one, engine, 2)
    path = f"checkpoints/{list_committed(store)[0]}/{manifest.NAME}"
    document = json.loads(store.read(path)) | {"format_version": 7}
    if valid == "other fields":
        document = {"format_version": 7, "content": []}
    if valid == "other checksum":
        document |= {"checksum": "sha512:00"}
    store.write(path, json.dumps(document).encode())
    for use in (
        lambda: find_manifest(store, None),
        lambda: find_manifest(store, 2),
        lambda: find_best(store),
    ):
        with pytest.raises(
            NewerFormatError, match=r"format_version=7 is newer than this dist_ft supports \(3\)"
        ):
            use()


@pytest.mark.parametrize("content", [b'{"format_version": true}', b"[7]", b"7", b"[" * 9999])
def test_other_content_is_damaged(content):
    with pytest.raises(manifest.DamagedError):
        manifest.parse_manifest(content, "m")


# The best checkpoint


def test_the_best_checkpoint_skips_damaged_manifests(store, attempt, engine, caplog):
    one = attempt(keep_best=1)
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0)):
        save(one, engine, step, loss=loss)
    store.write(f"checkpoints/step-000000002-a0001/{manifest.NAME}", b"{}")
    with caplog.at_level(logging.WARNING, "dist_ft"):
        assert find_best(store).progress.step == 3
    assert "checkpoint step-000000002-a0001 is skipped" in caplog.text


def test_the_best_checkpoint_is_the_one_that_was_evaluated(store, attempt, engine, monkeypatch):
    """A step that two attempts trained has two checkpoints; only one had this loss."""
    monkeypatch.setattr("dist_ft.checkpoint.retention.remove_unretained", lambda *_: None)
    train(engine, range(1))
    one = attempt()
    save(one, engine, 1, loss=2.5)
    save(one, engine, 2, loss=1.0)
    two = attempt()
    save(two, engine, 2, loss=2.0)
    best = find_best(store)
    assert (best.folder_name, best.evaluation["loss"]) == ("step-000000002-a0001", 1.0)
    assert load_manifest(store, list_committed(store)[0]).attempt == 2
