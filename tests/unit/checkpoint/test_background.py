"""Saves in the background: the state of the moment, no second copy, one outcome for all.

What fails is told.
"""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from unit.small import checkpoints, draft, make_engine, make_model, tensors_of, train

from dist_ft.checkpoint import discovery, fragments
from dist_ft.checkpoint.discovery import list_committed, start_attempt
from dist_ft.checkpoint.manager import CheckpointManager
from dist_ft.core.errors import CheckpointError, StorageError
from dist_ft.core.world import Collectives, World
from dist_ft.storage.filesystem import Store

ROWS = np.array([[0, 0, 0, 1, 0, 5]], dtype=np.int64)


def until_it_ends(manager: CheckpointManager):
    """Go on as a training loop does, until the save has ended; return how."""
    for _ in range(1000):
        outcome = manager.advance(*manager.save_flags())
        if outcome is not None:
            return outcome
        threading.Event().wait(0.01)
    raise AssertionError("the save does not end")


@pytest.fixture
def held(monkeypatch):
    """Hold back all writes of fragment files until the event is set."""
    gate = threading.Event()

    def write(self, path, content, real=Store.write):
        assert not path.endswith(".safetensors") or gate.wait(20)
        real(self, path, content)

    monkeypatch.setattr(Store, "write", write)
    yield gate
    gate.set()


def test_what_is_saved_is_the_state_of_the_moment(store, attempt, engine, held):
    want = {(slot.name, slot.key): slot.read().clone() for slot in engine.state_slices()}
    one = attempt()
    one.start_save(engine, draft(engine, 1, ROWS, before=2.5))
    assert one.save_in_progress and one.save_flags() == (0.0, 0.0) and one.advance(0.0, 0.0) is None
    train(engine, range(2))
    held.set()
    outcome = until_it_ends(one)
    assert (
        outcome.problem is None
        and one.save_in_progress is None
        and outcome.url == store.full_url("checkpoints/step-000000001-a0001")
    )
    manifest = one.find_latest()
    assert manifest.evaluation == {"before": 2.5}
    other = make_engine(model=make_model(initializer_range=1.0))
    one.load(manifest, other, tensors_of(other))
    got = {(slot.name, slot.key): slot.read() for slot in other.state_slices()}
    assert got.keys() == want.keys() and all(torch.equal(got[where], want[where]) for where in want)


def test_the_files_are_those_of_a_save_that_training_waits_for(store, engine):
    files = []
    for number in range(2):
        manager = CheckpointManager(
            store.child(str(number)), checkpoints(), World(), Collectives(), 1
        )
        if number:
            manager.start_save(engine, draft(engine, 1, ROWS))
            manager.finish_save()
        else:
            manager.save(engine, draft(engine, 1, ROWS))
        files.append(manager.find_latest().files)
    assert files[0] == files[1]


def test_buffers_are_made_once(attempt, engine):
    one = attempt()
    one.prepare(engine)
    places = [buffer.data_ptr() for buffer in one._writer._buffers]
    for step in (1, 2):
        one.start_save(engine, draft(engine, step, ROWS + step - 1))
        assert one.finish_save().problem is None
        train(engine, range(step, step + 1))
    assert places == [buffer.data_ptr() for buffer in one._writer._buffers] and len(places) > 0


def test_storage_that_fails_is_one_outcome_and_leaves_nothing(store, attempt, engine, monkeypatch):
    def write(self, path, content, real=Store.write):
        if path.endswith(".safetensors"):
            raise StorageError("no room")
        real(self, path, content)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "write", write)
        one = attempt()
        one.start_save(engine, draft(engine, 1, ROWS))
        outcome = until_it_ends(one)
        assert str(outcome.problem) == "no room" and outcome.request.rows is ROWS
    assert list_committed(store) == [] and store.list("checkpoints") == []
    one.start_save(engine, draft(engine, 2, ROWS))
    assert until_it_ends(one).problem is None


def test_nothing_is_written_after_a_save_has_failed(store, attempt, engine, monkeypatch):
    """Files that wait behind the one that failed do not fill the room that was cleared."""

    def write(self, path, content, real=Store.write):
        if path.endswith("0000.safetensors"):
            raise StorageError("no room")
        threading.Event().wait(0.02)
        real(self, path, content)

    monkeypatch.setattr(fragments, "MAX_FILE_BYTES", 2048)
    monkeypatch.setattr(Store, "write", write)
    one = attempt()
    one.start_save(engine, draft(engine, 1, ROWS))
    assert len(one._writer._buffers) > 20
    assert str(until_it_ends(one).problem) == "no room"
    for _ in range(10):
        assert store.list("checkpoints") == []
        threading.Event().wait(0.02)


def test_a_manifest_that_can_not_be_written_is_one_outcome(store, attempt, engine, monkeypatch):
    def write(self, path, content, real=Store.write):
        if path == "manifest.json":
            raise StorageError("no room")
        real(self, path, content)

    monkeypatch.setattr(Store, "write", write)
    one = attempt()
    one.start_save(engine, draft(engine, 1, ROWS))
    assert str(until_it_ends(one).problem) == "no room"
    assert store.list("checkpoints") == []


def test_fault_11_an_older_attempt_does_not_commit_in_the_background_either(
    store, attempt, engine, held
):
    one = attempt()
    one.start_save(engine, draft(engine, 1, ROWS))
    start_attempt(store, 1)
    held.set()
    with pytest.raises(
        CheckpointError, match=r"attempt 1 must not commit, attempt 2 has taken over the run"
    ):
        until_it_ends(one)
    assert list_committed(store) == []


def test_a_bug_in_the_background_is_told(attempt, engine, monkeypatch):
    monkeypatch.setattr(Store, "write", lambda *args: 1 / 0)
    one = attempt()
    one.start_save(engine, draft(engine, 1, ROWS))
    with pytest.raises(
        CheckpointError, match=r"the save failed \(ZeroDivisionError: division by zero\)"
    ):
        until_it_ends(one)


def test_the_drain_is_throttled(attempt, engine, tmp_path):
    import time

    from dist_ft.checkpoint import fragments

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fragments, "MAX_FILE_BYTES", 2**14)
        manager = CheckpointManager(
            Store(str(tmp_path / "slow")),
            checkpoints(background_mb_s=0.4),
            World(),
            Collectives(),
            1,
        )
        begun = time.monotonic()
        manager.start_save(engine, draft(engine, 1, ROWS))
        taken = time.monotonic() - begun
        manager.finish_save()
        files = manager.find_latest().files
    least = sum(item.num_bytes for item in files[:-1]) / 0.4e6
    assert len(files) > 3 and time.monotonic() - begun > least > taken


def test_what_is_under_way_is_left_when_all_ends(store, attempt, engine, held):
    one = attempt()
    one.start_save(engine, draft(engine, 1, ROWS))
    one.close()
    held.set()
    assert discovery.find_latest(store, World(), Collectives()) is None
