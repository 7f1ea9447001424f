"""Checkpoints on the nodes: taken when they are whole and newer, passed over when not, and cleared away."""

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
def begin(store, tmp_path):
    """Return a function that begins an attempt.

    It returns the manager and the checkpoint it goes on from.
    """

    def run(layout="plain, 1 workers", **section):
        nodes = LocalTier(store, Store(str(tmp_path / "node")), layout, World(), Collectives())
        made = CheckpointManager(
            store,
            checkpoints(**{"keep_last": 9, **section}),
            World(),
            Collectives(),
            start_attempt(store, 1),
            nodes,
        )
        return made, made.find_latest()

    return run


def there(tmp_path):
    return sorted(path.name for path in (tmp_path / "node").glob("*"))


@pytest.mark.parametrize("background", [True, False])
def test_the_newest_of_both_is_taken(store, tmp_path, begin, engine, background):
    one, _ = begin()

    def save(draft):
        if background:
            one.start_save(engine, draft)
            return one.finish_save()
        return one.save(engine, draft)

    save(draft(engine, 1, rows(0)))
    outcome = save(local_draft(engine, 2, 1))
    assert outcome.problem is None and outcome.url == str(tmp_path / "node/step-000000002-a0001")
    want = {(slot.name, slot.key): slot.read().clone() for slot in engine.state_slices()}
    two, newest = begin()
    assert newest.progress.step == 2 and newest.layout == "plain, 1 workers"
    other = make_engine(model=make_model(initializer_range=1.0))
    two.load(newest, other, tensors_of(other))
    assert all(torch.equal(slot.read(), want[slot.name, slot.key]) for slot in other.state_slices())
    assert read_ledger(store, newest)[:, 0].tolist() == [0, 1]
    assert two.save(engine, draft(engine, 3, rows(2))).problem is None
    _, newest = begin()
    assert newest.progress.step == 3 and not newest.layout, "storage has the newer one"
    assert read_ledger(store, newest)[:, 0].tolist() == [0, 1, 2]
    assert store.list(FOLDER) == []


def test_older_ones_and_their_ledger_go(store, tmp_path, begin, engine):
    one, _ = begin()
    one.save(engine, draft(engine, 1, rows(0)))
    for step in (2, 3, 4):
        one.start_save(engine, local_draft(engine, step, *range(1, step)))
        assert one.finish_save().problem is None
    one.save(engine, local_draft(engine, 5, 1, 2, 3, 4))
    one._writer.submit(lambda: None).result()
    until = [name for name in there(tmp_path) if name < "step-000000005-a0001"]
    assert until == [] or len(until) == 1  # what is removed in the background may still be at it
    assert store.list(FOLDER) == ["step-000000005-a0001"]
    assert len(store.list("ledger")) == 2
    one.save(engine, draft(engine, 6, rows(1, 2, 3, 4, 5)))
    assert store.list(FOLDER) == [] and len(store.list("ledger")) == 2
    assert read_ledger(store, one.find_latest())[:, 0].tolist() == list(range(6))


def test_the_same_step_in_both(store, begin, engine):
    one, _ = begin()
    one.save(engine, local_draft(engine, 2, 0, 1))
    one.save(engine, draft(engine, 2, rows(0, 1)))
    assert read_ledger(store, one.find_latest())[:, 0].tolist() == [0, 1]


@pytest.mark.parametrize(
    ("harm", "said"),
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
def test_a_node_that_lost_its_files_falls_back_to_storage(
    store, tmp_path, begin, engine, caplog, harm, said
):
    one, _ = begin()
    one.save(engine, draft(engine, 1, rows(0)))
    one.save(engine, local_draft(engine, 2, 1))
    harm(tmp_path / "node/step-000000002-a0001")
    with caplog.at_level(logging.WARNING, "dist_ft"):
        two, newest = begin()
        other = make_engine(model=make_model(initializer_range=1.0))
        newest = two.load(newest, other, tensors_of(other))
    assert newest.progress.step == 1
    assert any(
        "local checkpoint" in text and "is skipped" in text and said in text
        for text in caplog.messages
    )
    assert store.list(FOLDER) == [], "nobody may go on from it any more"
    two.save(engine, draft(engine, 3, rows(1, 2)))
    assert read_ledger(store, two.find_latest())[:, 0].tolist() == [0, 1, 2]


def test_other_workers_or_stages_take_what_is_in_storage(begin, engine, caplog):
    one, _ = begin()
    one.save(engine, draft(engine, 1, rows(0)))
    one.save(engine, local_draft(engine, 2, 1))
    with caplog.at_level(logging.WARNING, "dist_ft"):
        _, newest = begin(layout="zero-2, 4 workers")
    assert newest.progress.step == 1
    assert (
        "local checkpoint step-000000002-a0001 is skipped: it was written by plain, 1 workers, "
        "this run has zero-2, 4 workers" in caplog.messages
    )


def test_without_any_in_storage_the_run_begins_anew_if_the_nodes_lost_theirs(
    tmp_path, begin, engine
):
    one, _ = begin()
    one.save(engine, local_draft(engine, 2, 0, 1))
    assert begin()[1].progress.step == 2
    for file in (tmp_path / "node").glob("*/*"):
        file.unlink()
    assert begin()[1] is None


def test_a_node_disk_that_fails_is_one_outcome(store, tmp_path, begin, engine):
    one, _ = begin()
    (tmp_path / "node").write_text("not a folder")
    outcome = one.save(engine, local_draft(engine, 2, 0, 1))
    assert outcome.problem is not None and "cannot write it" in str(outcome.problem)
    assert store.list(FOLDER) == []
    assert one.save(engine, draft(engine, 3, rows(0, 1, 2))).problem is None


def test_fault_11_an_older_attempt_can_not_commit_on_nodes_either(store, begin, engine):
    one, _ = begin()
    begin()
    with pytest.raises(Exception, match="attempt 1 must not commit, attempt 2 has taken over"):
        one.save(engine, local_draft(engine, 2, 0, 1))
    assert store.list(FOLDER) == []


def test_commands_for_people_see_what_is_in_storage_only(store, begin, engine):
    one, _ = begin()
    one.save(engine, local_draft(engine, 2, 0, 1))
    assert discovery.list_committed(store) == []


def test_damage_found_while_loading_without_any_in_storage(store, tmp_path, begin, engine):
    one, _ = begin()
    one.save(engine, local_draft(engine, 2, 0, 1))
    for file in (tmp_path / "node").glob("*/*"):
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    two, newest = begin()
    with pytest.raises(
        CheckpointError,
        match="checkpoint step-000000002-a0001 is gone, and there is no earlier one; run the same",
    ):
        two.load(newest, engine, tensors_of(engine))
    assert begin()[1] is None
