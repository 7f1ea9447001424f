"""Attempt numbers come from everything that carries one, and only one start gets a number."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
from unit.small import save

from dist_ft.checkpoint import attempts
from dist_ft.checkpoint.attempts import Fence, latest_attempt, num_failures, start_attempt
from dist_ft.checkpoint.discovery import list_committed
from dist_ft.core.errors import CheckpointError, ConfigError, DistFtError
from dist_ft.storage.filesystem import Store

WHERE = "the checkpoint"


def folder_of(store: Store) -> Path:
    return Path(store.url)


# Numbers


@pytest.mark.parametrize(
    "path",
    [
        "attempts/000007.json",
        "attempts/000007-rank-00000-stacks.txt",
        "time/000007.json",
        "checkpoints/step-000000004-a0007/rank-00000-0000.safetensors",
        "node-checkpoints/step-000000004-a0007/manifest.json",
        "frozen/step-000000004-a0007/rank-00000-0000.safetensors",
        "ledger/000000000-000000004-a0007.safetensors.zst",
        "tensorboard/attempt-0007/events",
    ],
)
def test_fault_26_whatever_carries_a_number_keeps_it_from_coming_again(store, path):
    store.write(path, b"")
    assert latest_attempt(store) == 7
    assert start_attempt(store, 1) == 8


@pytest.mark.parametrize(
    "path",
    [
        "attempts/notes.json",
        "attempts/000009.txt",
        "attempts/\u00b2.json",
        "time/9",
        "checkpoints/old-a0009",
        "checkpoints/step-x-a0009",
        "ledger/a0009",
        "tensorboard/9",
        "metrics.jsonl",
    ],
)
def test_other_files_carry_no_number(store, path):
    store.write(path, b"")
    assert latest_attempt(store) == 0


def test_a_number_that_the_nodes_know_of_does_not_come_again(store):
    assert start_attempt(store, 1, known=4) == 5


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"null", b'"a"', b"[" * 5000, b"\xff"])
def test_a_damaged_record_counts_with_its_number(store, content):
    store.write("attempts/000003.json", content)
    assert num_failures(store, 3) == 0
    assert start_attempt(store, 1, "worker 0 on node a: killed") == 4
    assert num_failures(store, 4) == 1


def test_a_record_replaced_by_a_folder_counts_with_its_number(store):
    store.write("attempts/000003.json/file", b"")
    assert num_failures(store, 3) == 0
    assert start_attempt(store, 1) == 4


def test_a_file_in_the_place_of_the_folder_is_one_error_and_no_endless_search(store):
    store.write("attempts", b"")
    with pytest.raises(DistFtError, match="a file is in the place of the folder") as caught:
        start_attempt(store, 1)
    assert "\n" not in str(caught.value)


# Exclusive numbers


def create_anyway(store: Store, path: str, content: bytes) -> bool:
    """As a store does that ignores the condition of a conditional write."""
    store.write(path, content)
    return True


def test_fault_27_a_store_without_conditional_writes_is_refused(store, monkeypatch):
    monkeypatch.setattr(Store, "create", create_anyway)
    with pytest.raises(ConfigError) as caught:
        start_attempt(store, 1)
    assert caught.value.problems == (
        "run.storage: a file that exists could be created again, so two starts of a run could not "
        "be distinguished. Only storage with conditional writes (If-None-Match) is allowed. Use "
        "another endpoint or file system.",
    )
    assert (caught.value.exit_code, caught.value.retryable) == (2, False)
    assert store.walk() == [], "nothing is left behind"


def test_fault_27_a_refused_start_does_not_replace_a_running_attempt(
    store, attempt, engine, monkeypatch
):
    one = attempt()
    monkeypatch.setattr(Store, "create", create_anyway)
    with pytest.raises(ConfigError):
        start_attempt(store, 1)
    save(one, engine, 1)
    assert list_committed(store) == ["step-000000001-a0001"]


def test_fault_27_of_two_starts_that_got_one_number_the_last_writer_has_it(store, monkeypatch):
    """A store that checks and then writes lets both creators through."""
    real, other = Store.create, json.dumps({"token": "other"}).encode()

    def create(self, path, content):
        created = real(self, path, content)
        if created:
            self.write(path, other)  # passed its own check before this one was written
        return created

    monkeypatch.setattr(Store, "create", create)
    with pytest.raises(CheckpointError, match="took the number at the same moment") as caught:
        start_attempt(store, 1)
    assert not caught.value.retryable and store.read("attempts/000001.json") == other


def test_the_probe_needs_one_request_more_than_the_record(store, monkeypatch):
    created = []
    real = Store.create
    monkeypatch.setattr(
        Store,
        "create",
        lambda self, path, content: (created.append(path), real(self, path, content))[1],
    )
    start_attempt(store, 1)
    assert created == ["attempts/000001.json"] * 2


# The fence


def started(store: Store) -> Fence:
    store.write("run.yaml", b"run: {}")
    fence = Fence(store, start_attempt(store, 1))
    fence.remember_record()
    return fence


@pytest.mark.parametrize("lost", ["attempts", "attempts/000001.json"])
def test_fault_26_a_lost_record_is_written_again(store, caplog, lost):
    fence = started(store)
    before = store.read("attempts/000001.json")
    store.remove(lost)
    with caplog.at_level(logging.WARNING, "dist_ft"):
        fence.require_current(WHERE)
        fence.require_current(WHERE)
    assert store.read("attempts/000001.json") == before
    assert caplog.text.count("was removed; written again") == 1
    assert start_attempt(store, 1) == 2
    with pytest.raises(CheckpointError, match="attempt 2 has taken over"):
        fence.require_current(WHERE)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"{}"])
def test_fault_26_a_damaged_record_is_written_again(store, caplog, content):
    fence = started(store)
    before = store.read("attempts/000001.json")
    store.write("attempts/000001.json", content)
    with caplog.at_level(logging.WARNING, "dist_ft"):
        fence.require_current(WHERE)
    assert store.read("attempts/000001.json") == before
    assert "000001.json was damaged; written again" in caplog.text


def test_fault_26_a_folder_in_the_place_of_the_record_does_not_stop_the_run(store):
    fence = started(store)
    store.remove("attempts")
    store.write("attempts/000001.json/file", b"")
    fence.require_current(WHERE)
    assert start_attempt(store, 1) == 2


def test_fault_26_without_any_trace_of_it_only_one_attempt_of_a_number_commits(store):
    """The folder of attempts is lost before the first checkpoint, and the run is started again."""
    first = started(store)
    store.remove("attempts")
    second = Fence(store, start_attempt(store, 1))
    second.remember_record()
    with pytest.raises(
        CheckpointError,
        match="attempt 1 must not commit, another start of the run took the same number",
    ):
        first.require_current(WHERE)
    second.require_current(WHERE)


def test_fault_26_a_run_that_was_removed_and_started_again_keeps_its_new_start(store):
    """At once, so that nothing of the running attempt is left that carries its number."""
    start_attempt(store, 1)
    old = started(store)
    shutil.rmtree(folder_of(store))
    new = started(store)
    assert store.list("attempts") == ["000001.json"]
    with pytest.raises(CheckpointError, match="the run was removed and started again"):
        old.require_current(WHERE)
    new.require_current(WHERE)


def test_fault_26_a_record_written_again_keeps_a_later_start_from_its_number(store):
    first = started(store)
    store.remove("attempts")
    first.require_current(WHERE)
    assert start_attempt(store, 1) == 2


def test_fault_26_a_newer_attempt_is_known_by_its_time_alone(store):
    fence = started(store)
    store.write("time/000002.json", b"{}")
    with pytest.raises(CheckpointError, match="attempt 2 has taken over"):
        fence.require_current(WHERE)


def test_a_run_whose_folder_was_removed_commits_nothing(store, attempt, engine):
    store.write("run.yaml", b"run: {}")
    one = attempt()
    save(one, engine, 1)
    shutil.rmtree(folder_of(store))
    with pytest.raises(CheckpointError, match="the run's folder was removed while the run trains"):
        save(one, engine, 2)
    assert list_committed(store) == [] and store.list("ledger") == []
    with pytest.raises(CheckpointError, match="the run's folder was removed while the run trains"):
        one.require_folder()


def test_a_checkpoint_that_was_removed_at_the_end_is_an_error(store, attempt, engine):
    store.write("run.yaml", b"run: {}")
    one = attempt()
    save(one, engine, 1)
    one.require_folder()
    store.remove("checkpoints")
    with pytest.raises(CheckpointError, match="was committed and has been removed since"):
        one.require_folder()


def test_the_names_of_folders_are_those_that_others_write_to(store):
    from dist_ft.checkpoint import ledger
    from dist_ft.training import time_ledger

    assert (ledger.FOLDER, time_ledger.FOLDER) == (attempts.LEDGER, attempts.TIME)
