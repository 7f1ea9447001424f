"""Saves in the background: the state at their start, no second copy, one outcome for all ranks.

Failures are reported.
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


def advance_until_done(manager: CheckpointManager):
    """Advance the save as a training loop does until it has ended; return how it ended."""
    for _ in range(1000):
        outcome = manager.advance(*manager.save_flags())
        if outcome is not None:
            return outcome
        threading.Event().wait(0.01)
    raise AssertionError("the save does not end")


@pytest.fixture
def held(monkeypatch):
    """Block all writes of fragment files until the event is set."""
    gate = threading.Event()

    def write(self, path, content, real=Store.write):
        assert not path.endswith(".safetensors") or gate.wait(20)
        real(self, path, content)

    monkeypatch.setattr(Store, "write", write)
    yield gate
    gate.set()


def test_a_background_save_writes_the_state_at_its_start(store, attempt, engine, held):
    expected = {(part.name, part.key): part.read().clone() for part in engine.state_slices()}
    one = attempt()
    one.start_save(engine, draft(engine, 1, ROWS, before=2.5))
    assert one.save_in_progress and one.save_flags() == (0.0, 0.0) and one.advance(0.0, 0.0) is None
    train(engine, range(2))
    held.set()
    outcome = advance_until_done(one)
    assert (
        outcome.problem is None
        and one.save_in_progress is None
        and outcome.url == store.full_url("checkpoints/step-000000001-a0001")
    )
    manifest = one.find_latest()
    assert manifest.evaluation == {"before": 2.5}
    other = make_engine(model=make_model(initializer_range=1.0))
    one.load(manifest, other, tensors_of(other))
    got = {(part.name, part.key): part.read() for part in other.state_slices()}
    assert got.keys() == expected.keys() and all(
        torch.equal(got[where], expected[where]) for where in expected
    )


def test_background_and_synchronous_saves_write_equal_files(store, engine):
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


def test_snapshot_buffers_are_reused(attempt, engine):
    one = attempt()
    one.prepare(engine)
    places = [buffer.data_ptr() for buffer in one._writer._buffers]
    for step in (1, 2):
        one.start_save(engine, draft(engine, step, ROWS + step - 1))
        assert one.finish_save().problem is None
        train(engine, range(step, step + 1))
    assert places == [buffer.data_ptr() for buffer in one._writer._buffers] and len(places) > 0


def test_a_storage_failure_gives_one_outcome_and_leaves_no_files(
    store, attempt, engine, monkeypatch
):
    def write(self, path, content, real=Store.write):
        if path.endswith(".safetensors"):
            raise StorageError("no room")
        real(self, path, content)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "write", write)
        one = attempt()
        one.start_save(engine, draft(engine, 1, ROWS))
        outcome = advance_until_done(one)
        assert str(outcome.problem) == "no room" and outcome.request.rows.samples is ROWS
    assert list_committed(store) == [] and store.list("checkpoints") == []
    one.start_save(engine, draft(engine, 2, ROWS))
    assert advance_until_done(one).problem is None


def test_no_file_is_written_after_a_save_has_failed(store, attempt, engine, monkeypatch):
    """Files queued behind the failed one must not fill the space that was freed."""

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
    assert str(advance_until_done(one).problem) == "no room"
    for _ in range(10):
        assert store.list("checkpoints") == []
        threading.Event().wait(0.02)


def test_a_failed_manifest_write_gives_one_outcome(store, attempt, engine, monkeypatch):
    def write(self, path, content, real=Store.write):
        if path == "manifest.json":
            raise StorageError("no room")
        real(self, path, content)

    monkeypatch.setattr(Store, "write", write)
    one = attempt()
    one.start_save(engine, draft(engine, 1, ROWS))
    assert str(advance_until_done(one).problem) == "no room"
    assert store.list("checkpoints") == []


def test_fault_11_an_older_attempt_does_not_commit_in_the_background(store, attempt, engine, held):
    one = attempt()
    one.start_save(engine, draft(engine, 1, ROWS))
    start_attempt(store, 1)
    held.set()
    with pytest.raises(
        CheckpointError, match=r"attempt 1 must not commit, attempt 2 has taken over the run"
    ):
        advance_until_done(one)
    assert list_committed(store) == []


def test_a_bug_in_the_background_is_reported(attempt, engine, monkeypatch):
    monkeypatch.setattr(Store, "write", lambda *args: 1 / 0)
    one = attempt()
    one.start_save(engine, draft(engine, 1, ROWS))
    with pytest.raises(
        CheckpointError, match=r"the save failed \(ZeroDivisionError: division by zero\)"
    ):
        advance_until_done(one)


def test_background_writing_is_throttled(attempt, engine, tmp_path):
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
        started = time.monotonic()
        manager.start_save(engine, draft(engine, 1, ROWS))
        taken = time.monotonic() - started
        manager.finish_save()
        files = manager.find_latest().files
    least = sum(item.num_bytes for item in files[:-1]) / 0.4e6
    assert len(files) > 3 and time.monotonic() - started > least > taken


def test_closing_the_manager_abandons_a_save_in_progress(store, attempt, engine, held):
    one = attempt()
    one.start_save(engine, draft(engine, 1, ROWS))
    one.close()
    held.set()
    assert discovery.find_latest(store, World(), Collectives()) is None
