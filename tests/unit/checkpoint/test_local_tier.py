"""Local checkpoints are used if complete and later, skipped if not, and cleaned up."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from unit.small import checkpoints, draft, make_engine, make_model, tensors_of

from dist_ft.checkpoint import discovery
from dist_ft.checkpoint.discovery import LOCAL_FOLDER as FOLDER
from dist_ft.checkpoint.discovery import start_attempt
from dist_ft.checkpoint.ledger import read_ledger
from dist_ft.checkpoint.local_tier import LocalTier
from dist_ft.checkpoint.manager import CheckpointManager
from dist_ft.checkpoint.tier import Tier
from dist_ft.core.errors import CheckpointError
from dist_ft.core.world import Collectives, World
from dist_ft.storage.filesystem import Store


def rows(*steps):
    return np.array([[step, 0, 0, step, 0, 5] for step in steps], np.int64).reshape(-1, 6)


def local_draft(engine, step, *steps):
    return replace(draft(engine, step, rows(*steps)), tier=Tier.LOCAL)


@pytest.fixture
def start_run(store, tmp_path):
    """Return a function that starts an attempt.

    It returns the manager and the checkpoint that the attempt resumes from.
    """

    def run(layout="plain, 1 workers", **section):
        nodes = LocalTier(store, Store(str(tmp_path / "node")), layout, World(), Collectives())
        manager = CheckpointManager(
            store,
            checkpoints(**{"keep_last": 9, **section}),
            World(),
            Collectives(),
            start_attempt(store, 1),
            nodes,
        )
        return manager, manager.find_latest()

    return run


def local_names(tmp_path):
    return sorted(path.name for path in (tmp_path / "node").glob("*"))


@pytest.mark.parametrize("background", [True, False])
def test_the_latest_checkpoint_of_both_tiers_is_loaded(
    store, tmp_path, start_run, engine, background
):
    one, _ = start_run()

    def save(draft):
        if background:
            one.start_save(engine, draft)
            return one.finish_save()
        return one.save(engine, draft)

    save(draft(engine, 1, rows(0)))
    outcome = save(local_draft(engine, 2, 1))
    assert outcome.problem is None and outcome.url == str(tmp_path / "node/step-000000002-a0001")
    expected = {(part.name, part.key): part.read().clone() for part in engine.state_slices()}
    two, latest = start_run()
    assert latest.progress.step == 2 and latest.layout == "plain, 1 workers"
    other = make_engine(model=make_model(initializer_range=1.0))
    two.load(latest, other, tensors_of(other))
    assert all(
        torch.equal(part.read(), expected[part.name, part.key]) for part in other.state_slices()
    )
    assert read_ledger(store, latest)[:, 0].tolist() == [0, 1]
    assert two.save(engine, draft(engine, 3, rows(2))).problem is None
    _, latest = start_run()
    assert latest.progress.step == 3 and not latest.layout, "the one in storage is later"
    assert read_ledger(store, latest)[:, 0].tolist() == [0, 1, 2]
    assert store.list(FOLDER) == []


def test_older_local_checkpoints_and_their_ledger_are_removed(store, tmp_path, start_run, engine):
    one, _ = start_run()
    one.save(engine, draft(engine, 1, rows(0)))
    for step in (2, 3, 4):
        one.start_save(engine, local_draft(engine, step, *range(1, step)))
        assert one.finish_save().problem is None
    one.save(engine, local_draft(engine, 5, 1, 2, 3, 4))
    one._writer.submit(lambda: None).result()
    until = [name for name in local_names(tmp_path) if name < "step-000000005-a0001"]
    assert until == [] or len(until) == 1  # what is removed in the background may still be at it
    assert store.list(FOLDER) == ["step-000000005-a0001"]
    assert len(store.list("ledger")) == 2
    one.save(engine, draft(engine, 6, rows(1, 2, 3, 4, 5)))
    assert store.list(FOLDER) == [] and len(store.list("ledger")) == 2
    assert read_ledger(store, one.find_latest())[:, 0].tolist() == list(range(6))


def test_the_same_step_can_be_saved_in_both_tiers(store, start_run, engine):
    one, _ = start_run()
    one.save(engine, local_draft(engine, 2, 0, 1))
    one.save(engine, draft(engine, 2, rows(0, 1)))
    assert read_ledger(store, one.find_latest())[:, 0].tolist() == [0, 1]


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (
            lambda folder: [file.unlink() for file in folder.glob("*.safetensors")][:0],
            "the file is missing",
        ),
        (
            lambda folder: [
                file.write_bytes(file.read_bytes()[:-9]) for file in folder.glob("*.safetensors")
            ],
            "according to the manifest",
        ),
        (
            lambda folder: [
                file.write_bytes(file.read_bytes()[:-1] + b"?")
                for file in folder.glob("*.safetensors")
            ],
            "its checksum differs from the manifest's",
        ),
    ],
)
def test_lost_local_files_cause_a_fallback_to_storage(
    store, tmp_path, start_run, engine, caplog, harm, message
):
    one, _ = start_run()
    one.save(engine, draft(engine, 1, rows(0)))
    one.save(engine, local_draft(engine, 2, 1))
    harm(tmp_path / "node/step-000000002-a0001")
    with caplog.at_level(logging.WARNING, "dist_ft"):
        two, latest = start_run()
        other = make_engine(model=make_model(initializer_range=1.0))
        latest = two.load(latest, other, tensors_of(other))
    assert latest.progress.step == 1
    assert any(
        "local checkpoint" in text and "is skipped" in text and message in text
        for text in caplog.messages
    )
    assert store.list(FOLDER) == [], "no later attempt may resume from it"
    two.save(engine, draft(engine, 3, rows(1, 2)))
    assert read_ledger(store, two.find_latest())[:, 0].tolist() == [0, 1, 2]


def test_another_layout_loads_from_storage(start_run, engine, caplog):
    one, _ = start_run()
    one.save(engine, draft(engine, 1, rows(0)))
    one.save(engine, local_draft(engine, 2, 1))
    with caplog.at_level(logging.WARNING, "dist_ft"):
        _, latest = start_run(layout="zero-2, 4 workers")
    assert latest.progress.step == 1
    assert (
        "local checkpoint step-000000002-a0001 is skipped: it was written by plain, 1 workers, "
        "this run has zero-2, 4 workers" in caplog.messages
    )


def test_a_run_without_any_usable_checkpoint_starts_again(tmp_path, start_run, engine):
    one, _ = start_run()
    one.save(engine, local_draft(engine, 2, 0, 1))
    assert start_run()[1].progress.step == 2
    for file in (tmp_path / "node").glob("*/*"):
        file.unlink()
    assert start_run()[1] is None


def test_a_failing_node_disk_gives_one_outcome(store, tmp_path, start_run, engine):
    one, _ = start_run()
    (tmp_path / "node").write_text("not a folder")
    outcome = one.save(engine, local_draft(engine, 2, 0, 1))
    assert outcome.problem is not None and "cannot write it" in str(outcome.problem)
    assert store.list(FOLDER) == []
    assert one.save(engine, draft(engine, 3, rows(0, 1, 2))).problem is None


def test_fault_11_an_older_attempt_does_not_commit_locally(store, start_run, engine):
    one, _ = start_run()
    start_run()
    with pytest.raises(Exception, match="attempt 1 must not commit, attempt 2 has taken over"):
        one.save(engine, local_draft(engine, 2, 0, 1))
    assert store.list(FOLDER) == []


def test_local_checkpoints_are_not_listed_by_default(store, start_run, engine):
    one, _ = start_run()
    one.save(engine, local_draft(engine, 2, 0, 1))
    assert discovery.list_committed(store) == []


def test_local_damage_without_a_checkpoint_in_storage_is_an_error(
    store, tmp_path, start_run, engine
):
    one, _ = start_run()
    one.save(engine, local_draft(engine, 2, 0, 1))
    for file in (tmp_path / "node").glob("*/*"):
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    two, latest = start_run()
    with pytest.raises(
        CheckpointError,
        match=r"checkpoint step-000000002-a0001 was removed, and no earlier one exists\. Run the",
    ):
        two.load(latest, engine, tensors_of(engine))
    assert start_run()[1] is None
