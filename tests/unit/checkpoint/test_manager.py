"""Committing, falling back, retention and rejection of checkpoints of a small real engine."""

from __future__ import annotations

import logging
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from unit.small import checkpoints, make_engine, make_model, save, tensors_of, train

from dist_ft.checkpoint import attempts, discovery, fragments, retention
from dist_ft.checkpoint import manifest as manifests
from dist_ft.checkpoint.discovery import (
    latest_attempt,
    list_committed,
    load_manifest,
    num_failures,
    start_attempt,
)
from dist_ft.checkpoint.ledger import read_ledger
from dist_ft.checkpoint.manager import CheckpointManager
from dist_ft.checkpoint.manifest import NewerFormatError
from dist_ft.checkpoint.retention import select_retained
from dist_ft.core.errors import CheckpointError, StorageError
from dist_ft.core.world import Collectives, World
from dist_ft.storage.filesystem import Store

FILES = ["manifest.json", "rank-00000-0000.safetensors", "rank-00000-0001.safetensors"]


def found(store: Store) -> int | None:
    manifest = discovery.find_latest(store, World(), Collectives())
    return manifest.progress.step if manifest else None


# Commit and load


@pytest.mark.parametrize("url", ["folder", "memory://run-of-manager-test"])
def test_a_resumed_run_is_bit_exact(url, tmp_path):
    store = Store(url if "://" in url else str(tmp_path / url))
    straight = make_engine()
    expected = train(straight, range(5))
    first = make_engine()
    train(first, range(3))
    one = CheckpointManager(store, checkpoints(), World(), Collectives(), start_attempt(store, 1))
    assert save(one, first, 3, before=2.5) == store.full_url("checkpoints/step-000000003-a0001")

    two = CheckpointManager(store, checkpoints(), World(), Collectives(), start_attempt(store, 1))
    manifest = two.find_latest()
    assert (manifest.progress.step, manifest.attempt, manifest.evaluation) == (
        3,
        1,
        {"before": 2.5},
    )
    assert set(manifest.versions) >= {"torch", "transformers", "safetensors"}
    second = make_engine(model=make_model(initializer_range=1.0))
    train(second, range(1))
    two.load(manifest, second, tensors_of(second))
    assert second.optimizer_step() == 3
    assert train(second, range(3, 5)) == expected[3:]


def test_the_manifest_is_written_last(store, attempt, engine, monkeypatch):
    written = []
    monkeypatch.setattr(
        Store,
        "write",
        lambda self, path, content, real=Store.write: (
            written.append(path),
            real(self, path, content),
        )[1],
    )
    save(attempt(), engine, 1)
    assert written[-1] == manifests.NAME and written[-2].startswith("ledger/")


def test_a_checkpoint_of_another_model_is_rejected(store, attempt, engine):
    one = attempt()
    save(one, engine, 1)
    manifest, where = one.find_latest(), store.full_url("checkpoints/step-000000001-a0001")
    smaller = make_engine(model=make_model(intermediate_size=40))
    with pytest.raises(
        CheckpointError,
        match=re.escape(
            f"{where}: model.layers.0.mlp.down_proj.weight is [32, 48] in the checkpoint and [32, "
            "40] in the model. Both must be the same. Check model.path."
        ),
    ):
        one.load(manifest, smaller, tensors_of(smaller))
    deeper = make_engine(model=make_model(num_hidden_layers=3))
    with pytest.raises(CheckpointError, match="is absent in the checkpoint and "):
        one.load(manifest, deeper, tensors_of(deeper))


def test_missing_optimizer_state_is_an_error(attempt, engine):
    one = attempt()
    save(one, engine, 1)
    other = make_engine(name="sgd", momentum=0.9)
    with pytest.raises(
        CheckpointError,
        match="elements from 0 of momentum_buffer of .* are not in this checkpoint. It "
        r"belongs to another model or optimizer. Check .* optimizer\.name\.",
    ):
        one.load(one.find_latest(), other, tensors_of(other))


# Falling back


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "remove"])
@pytest.mark.parametrize("name", FILES)
def test_damage_to_any_file_causes_a_fallback_and_is_logged(
    store, attempt, engine, monkeypatch, caplog, name, damage
):
    monkeypatch.setattr(fragments, "MAX_FILE_BYTES", 2**17)
    one = attempt()
    save(one, engine, 1)
    where = save(one, engine, 2)
    assert sorted(os.listdir(where)) == FILES
    path = os.path.join(where, name)
    with open(path, "rb") as file:
        content = bytearray(file.read())
    if damage == "remove":
        os.remove(path)
    else:
        content[len(content) // 2] ^= 4
        length = {"flip": len(content), "truncate": len(content) - 1, "empty": 0}[damage]
        with open(path, "wb") as file:
            file.write(content[:length])
    with caplog.at_level(logging.WARNING, "dist_ft"):
        assert found(store) == 1
    if (name, damage) == ("manifest.json", "remove"):
        return  # never committed, so nothing is logged
    assert len(caplog.records) == 1
    message = caplog.records[0].getMessage()
    assert message.startswith(f"checkpoint step-000000002-a0001 is skipped: {path}: ")
    reason = {"flip": "its checksum differs", "remove": "the file is missing"}.get(
        damage,
        f"has {0 if damage == 'empty' else len(content) - 1} bytes, but {len(content)} according",
    )
    assert (
        reason if name != "manifest.json" else "truncated or altered since it was written"
    ) in message


@pytest.mark.parametrize(
    "entry",
    [
        lambda path, *parts: manifests.file_entry(path, b"".join(parts)),
        manifests.file_entry_in_blocks,
    ],
)
@pytest.mark.parametrize("place", [0, 9, 5000, -1])
@pytest.mark.parametrize("name", FILES[1:])
def test_fault_17_a_flipped_bit_is_found_while_loading(
    store, attempt, monkeypatch, caplog, name, place, entry
):
    """The lengths are right, so `find_latest` returns it.

    `load` falls back to the checkpoint before, and to the history that it ends.
    """
    monkeypatch.setattr(fragments, "MAX_FILE_BYTES", 2**17)
    monkeypatch.setattr(manifests, "BLOCK_BYTES", 2**12)
    monkeypatch.setattr(manifests, "file_entry_in_blocks", entry)
    engine, one = make_engine(), attempt()
    train(engine, range(1))
    save(one, engine, 1)
    expected = [part.read().clone() for part in engine.state_slices()]
    train(engine, range(1, 2))
    path = os.path.join(save(one, engine, 2), name)
    with open(path, "rb+") as file:
        content = bytearray(file.read())
        content[place] ^= 4
        file.seek(0)
        file.write(content)
    two, other = attempt(), make_engine(model=make_model(initializer_range=1.0))
    manifest = two.find_latest()
    assert manifest.progress.step == 2
    with caplog.at_level(logging.WARNING, "dist_ft"):
        loaded = two.load(manifest, other, tensors_of(other))
    assert (
        loaded.progress.step,
        other.optimizer_step(),
        two.latest_step,
        two._committer._ledger,
    ) == (
        1,
        1,
        1,
        loaded.ledger,
    )
    assert [record.getMessage() for record in caplog.records] == [
        f"checkpoint step-000000002-a0001 is skipped: {path}: its checksum differs from the "
        "manifest's"
    ]
    assert all(
        np.array_equal(part.read(), values)
        for part, values in zip(other.state_slices(), expected, strict=True)
    )


def test_loading_fails_if_all_checkpoints_are_damaged(store, attempt, engine):
    one = attempt()
    for step in (1, 2):
        with open(os.path.join(save(one, engine, step), FILES[1]), "rb+") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"?")
    with pytest.raises(
        CheckpointError,
        match=r"none of the 2 committed checkpoints can be loaded \(the latest: .*its checksum",
    ):
        one.load(one.find_latest(), engine, tensors_of(engine))


def test_a_restore_reads_each_byte_once(store, attempt, engine, monkeypatch):
    """Except the first block of each file, which holds the header."""
    monkeypatch.setattr(fragments, "MAX_FILE_BYTES", 2**17)
    monkeypatch.setattr(manifests, "BLOCK_BYTES", 2**12)
    one, read = attempt(), []
    save(one, engine, 1)
    monkeypatch.setattr(
        Store,
        "read_into",
        lambda self, path, start, memory, real=Store.read_into: (
            read.append((path, start, start + len(memory))),
            real(self, path, start, memory),
        )[1],
    )
    manifest = one.find_latest()
    one.load(manifest, engine, tensors_of(engine))
    for item in manifest.files:
        parts = sorted((start, stop) for path, start, stop in read if path == item.path)
        assert parts[0] == (0, 2**12) and parts[1:] == [(0, item.num_bytes)]


def test_a_run_with_only_damaged_checkpoints_does_not_start_again(store, attempt, engine):
    assert found(store) is None
    one = attempt()
    for step in (1, 2):
        os.remove(os.path.join(save(one, engine, step), FILES[1]))
    with pytest.raises(
        CheckpointError,
        match=r"/run/checkpoints: none of the 2 committed checkpoints can be loaded \(the latest: "
        r".*step-000000002-a0001/rank-00000-0000.safetensors: the file is missing\)\. "
        r"Restore one from a copy, or move the folder away to start again\.",
    ):
        found(store)
    assert len(list_committed(store)) == 2


def test_a_file_damaged_in_transit_is_read_again(store, attempt, engine, monkeypatch):
    save(attempt(), engine, 1)
    damaged = []

    def read_into(self, path, start, memory, real=Store.read_into):
        content = real(self, path, start, memory)
        if not damaged:
            damaged.append(path)
            content[-1] ^= 1
        return content

    monkeypatch.setattr(Store, "read_into", read_into)
    assert found(store) == 1 and damaged


def test_a_copied_checkpoint_is_skipped(store, attempt, engine, caplog):
    where = save(attempt(), engine, 1)
    shutil.copytree(where, where.replace("step-000000001", "step-000000009"))
    with caplog.at_level(logging.WARNING, "dist_ft"):
        assert found(store) == 1
    assert (
        "is the manifest of step-000000001-a0001; a checkpoint must not be copied or renamed"
        in caplog.text
    )


def test_a_checkpoint_of_a_newer_version_stops_the_run(store, attempt, engine):
    one = attempt()
    save(one, engine, 1)
    save(one, engine, 2)
    latest = load_manifest(store, list_committed(store)[0])
    store.write(
        f"checkpoints/{list_committed(store)[0]}/{manifests.NAME}",
        manifests.serialize_manifest(latest.model_copy(update={"format_version": 4})),
    )
    with pytest.raises(
        NewerFormatError,
        match=r"format_version=4 is newer than this dist_ft supports \(3\)\. Update dist_ft\.",
    ):
        found(store)


# Retention


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "expected"),
    [
        (1, 0, [7]),
        (2, 0, [7, 6]),
        (1, 2, [7, 6, 4, 2]),
        (9, 0, [7, 6, 5, 4, 3, 2, 1]),
        (1, 5, [7, 5]),
    ],
)
def test_select_retained(keep_last, keep_every, expected):
    names = [manifests.folder_name(step, 1) for step in range(7, 0, -1)]
    section = checkpoints(keep_last=keep_last, keep_every_steps=keep_every)
    assert [
        manifests.parse_folder(name)[0] for name in select_retained(names, section, {})
    ] == expected


@pytest.mark.parametrize(
    ("keep_best", "expected"), [(0, [7]), (1, [7, 3]), (2, [7, 3, 2]), (3, [7, 5, 3, 2])]
)
def test_the_best_checkpoints_are_retained(keep_best, expected):
    """Of equally good ones the latest is retained; one without a loss is not a candidate."""
    names = [manifests.folder_name(step, 1) for step in range(7, 0, -1)]
    losses = dict(zip(names[1:], [3.0, 2.0, 2.5, 1.0, 1.5, 2.0], strict=True))
    found = select_retained(names, checkpoints(keep_last=1, keep_best=keep_best), losses)
    assert [manifests.parse_folder(name)[0] for name in found] == expected


def test_the_checkpoint_with_the_lowest_held_out_loss_is_retained(store, attempt, engine):
    one = attempt(keep_last=1, keep_best=1)
    for step, loss in enumerate([5.0, 3.0, 4.0, 3.5], 1):
        save(one, engine, step, loss=loss)
    assert [manifests.parse_folder(name)[0] for name in list_committed(store)] == [4, 2]
    save(one, engine, 5, loss=2.0)
    save(one, engine, 6, loss=float("nan"))
    assert [manifests.parse_folder(name)[0] for name in list_committed(store)] == [6, 5]


def test_old_checkpoints_are_removed_and_the_ledger_stays(store, attempt, engine):
    one = attempt(keep_last=2, keep_every_steps=3)
    for step in range(1, 8):
        save(one, engine, step)
    assert [manifests.parse_folder(name)[0] for name in list_committed(store)] == [7, 6, 3]
    assert read_ledger(store, one.find_latest())[:, 0].tolist() == list(range(7))


def test_incomplete_checkpoints_are_removed_except_of_newer_attempts(store, attempt, engine):
    attempt()
    save(attempt(), engine, 2)
    for name in ("step-000000001-a0001", "step-000000001-a0002", "step-000000001-a0003"):
        store.write(f"checkpoints/{name}/rank-00000-0000.safetensors", b"torn")
    store.write("checkpoints/notes.txt", b"not ours")
    retention.remove_unretained(store, checkpoints(), 2, 0, "step-000000002-a0002")
    assert store.list("checkpoints") == [
        "notes.txt",
        "step-000000001-a0003",
        "step-000000002-a0002",
    ]


def test_fault_11_an_attempt_superseded_during_its_commit_is_undone(
    store, attempt, engine, monkeypatch
):
    one = attempt()

    def write(self, path, content, real=Store.write):
        if path == "manifest.json":
            start_attempt(store, 1)
        real(self, path, content)

    monkeypatch.setattr(Store, "write", write)
    with pytest.raises(
        CheckpointError, match="attempt 1 must not commit, attempt 2 has taken over"
    ):
        save(one, engine, 1)
    assert list_committed(store) == []


def test_fault_11_a_checkpoint_of_a_newer_attempt_is_later(store, attempt, engine, monkeypatch):
    """If an old attempt still manages to commit, later attempts do not resume from it."""
    one = attempt()
    save(one, engine, 1)
    two = attempt()
    save(two, engine, 3)
    with monkeypatch.context() as patch:
        for name in ("latest_attempt", "latest_record"):
            patch.setattr(attempts, name, lambda _: 1)
        save(one, engine, 5)
    assert list_committed(store)[:2] == ["step-000000003-a0002", "step-000000005-a0001"]
    assert attempt().latest_step == 3


def test_fault_17_two_damaged_checkpoints_in_a_row_are_skipped(store, attempt, engine):
    """The latest is altered, which loading detects; the one before is shorter than it was."""
    one = attempt()
    for step in (1, 2, 3):
        save(one, engine, step)
    for step, harm in ((3, lambda content: content[:-1] + b"?"), (2, lambda content: content[:-9])):
        path = Path(store.full_url(f"checkpoints/step-{step:09d}-a0001/{FILES[1]}"))
        path.write_bytes(harm(path.read_bytes()))
    two = attempt()
    assert two.latest_step == 3
    assert two.load(two.find_latest(), engine, tensors_of(engine)).progress.step == 1


def test_a_skipped_checkpoint_does_not_count_for_retention(store, attempt, engine):
    """keep_last counts checkpoints of the run's own history, not a later damaged one."""
    one = attempt()
    for step in (1, 2, 5):
        save(one, engine, step)
    os.remove(store.full_url("checkpoints/step-000000005-a0001/" + FILES[1]))
    two = attempt(keep_last=2)
    assert two.latest_step == 2
    save(two, engine, 3)
    assert list_committed(store) == ["step-000000003-a0002", "step-000000002-a0001"]


def test_a_failed_removal_is_logged(store, attempt, engine, monkeypatch, caplog, quick):
    one = attempt(keep_last=1)
    save(one, engine, 1)

    def refuse(self, path):
        raise StorageError(f"{path}: no")

    monkeypatch.setattr(Store, "remove", refuse)
    with caplog.at_level(logging.WARNING, "dist_ft"):
        save(one, engine, 2)
    assert (
        "checkpoint step-000000001-a0001 was not removed: "
        "checkpoints/step-000000001-a0001/manifest.json: no" in caplog.text
    )


# Attempts


def test_attempts_are_numbered(store):
    assert latest_attempt(store) == 0
    assert [start_attempt(store, 2) for _ in range(3)] == [1, 2, 3]
    store.write("attempts/notes.json", b"")
    store.write("attempts/000009.txt", b"")
    assert latest_attempt(store) == 3
    assert store.list("attempts")[0] == "000001.json"


def test_only_unplanned_ends_count_as_failures(store):
    for after in (
        "",
        "worker 1 on node a: killed",
        "planned: more workers came",
        "worker 0 on node a: hang",
    ):
        number = start_attempt(store, 2, after)
    assert [num_failures(store, attempt) for attempt in range(number + 1)] == [0, 0, 1, 1, 2]
    store.write("attempts/000004.json", b"{")
    assert num_failures(store, 4) == 0


def test_fault_11_a_worker_of_an_older_attempt_does_not_commit(store, attempt, engine):
    zombie = attempt()
    save(zombie, engine, 1)
    start_attempt(store, 1)
    with pytest.raises(CheckpointError) as caught:
        save(zombie, engine, 2)
    assert str(caught.value) == (
        f"{store.url}/checkpoints/step-000000002-a0001: attempt 1 must not commit, attempt 2 has "
        "taken over the run; this process ends"
    )
    assert not caught.value.retryable
    assert found(store) == 1


def test_the_ledger_continues_the_resumed_history(store, attempt, engine):
    one = attempt()
    save(one, engine, 2, np.array([[0, 0, 0, 0, 0, 5], [1, 0, 0, 1, 0, 5]]))
    where = save(one, engine, 4, np.array([[2, 0, 0, 2, 0, 5], [3, 0, 0, 3, 0, 5]]))
    os.remove(os.path.join(where, manifests.NAME))
    two = attempt()
    save(two, engine, 3, np.array([[2, 0, 0, 2, 0, 5]]))
    manifest = load_manifest(store, "step-000000003-a0002")
    assert [(segment.start, segment.stop) for segment in manifest.ledger] == [(0, 2), (2, 3)]
    assert read_ledger(store, manifest)[:, 3].tolist() == [0, 1, 2]
