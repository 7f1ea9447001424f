"""Frozen weights are written once per run and shared by its checkpoints."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from unit.small import checkpoints, draft, make_engine, make_model, save, tensors_of, train

from dist_ft.checkpoint import discovery
from dist_ft.checkpoint.attempts import Fence
from dist_ft.checkpoint.commit import Committer
from dist_ft.checkpoint.discovery import FROZEN, list_committed, load_manifest, start_attempt
from dist_ft.checkpoint.local_tier import LocalTier
from dist_ft.checkpoint.manager import CheckpointManager
from dist_ft.checkpoint.manifest import NewerFormatError
from dist_ft.checkpoint.retention import remove_unused_shared_files
from dist_ft.checkpoint.tier import Tier
from dist_ft.config.load import STORED
from dist_ft.core.errors import CheckpointError, StorageError
from dist_ft.core.world import Collectives, World
from dist_ft.runs import catalog
from dist_ft.storage.filesystem import Store

ROWS = np.array([[0, 0, 0, 1, 0, 5]], dtype=np.int64)


def partial(num_frozen: int = 1, **changes: Any) -> Any:
    """Return an engine whose first layers and embeddings are frozen."""
    model = make_model(**changes)
    model.get_input_embeddings().weight.requires_grad_(False)
    for layer in model.model.layers[:num_frozen]:
        layer.requires_grad_(False)
    return make_engine(model=model)


def own_bytes(store: Store, name: str) -> int:
    return sum(
        size
        for path, size in store.child(f"checkpoints/{name}").sizes().items()
        if path != "manifest.json"
    )


@pytest.fixture
def engine() -> Any:
    return partial()


def test_frozen_weights_are_written_once_and_named_by_all_checkpoints(store, attempt, engine):
    one = attempt(keep_last=3)
    frozen = engine.frozen_parameters()
    assert frozen and "model.embed_tokens.weight" in frozen
    for step in (1, 2, 3):
        train(engine, range(step - 1, step))
        save(one, engine, step)
    assert store.list(FROZEN) == ["step-000000001-a0001"]
    manifests = [load_manifest(store, name) for name in list_committed(store)]
    shared = [[item for item in manifest.files if item.shared] for manifest in manifests]
    assert shared[0] == shared[1] == shared[2] != [] and manifests[0].frozen == tuple(
        sorted(frozen)
    )
    trained = sum(parameter.numel() for parameter in engine._masters.values())
    assert (
        own_bytes(store, list_committed(store)[0]) < 1.3 * 4 * 3 * trained
    )  # weights and two moments; headers
    assert sum(item.num_bytes for item in shared[0]) >= 4 * sum(
        engine._parameters[name].numel() for name in frozen
    )


@pytest.mark.parametrize("in_background", [False, True])
def test_a_resumed_run_is_bit_exact_and_writes_no_frozen_weights(store, attempt, in_background):
    straight = partial()
    expected = train(straight, range(5))
    first, one = partial(), attempt()
    train(first, range(3))
    (save_in_background if in_background else save)(one, first, 3)
    two = CheckpointManager(store, checkpoints(), World(), Collectives(), start_attempt(store, 1))
    second = partial(initializer_range=1.0)
    two.load(two.find_latest(), second, tensors_of(second))
    for name, parameter in second._parameters.items():
        assert torch.equal(parameter, first._parameters[name]), name
    assert train(second, range(3, 5)) == expected[3:]
    save(two, second, 5)
    assert store.list(FROZEN) == ["step-000000003-a0001"]
    assert discovery.find_latest(store, World(), Collectives()).progress.step == 5


def save_in_background(manager: CheckpointManager, engine: Any, step: int) -> None:
    manager.start_save(engine, draft(engine, step, ROWS))
    outcome = manager.finish_save()
    assert outcome is not None and outcome.problem is None


def test_weights_that_become_trainable_are_in_each_checkpoint(store, attempt):
    first, one = partial(2), attempt()
    save(one, first, 1)
    two = CheckpointManager(store, checkpoints(), World(), Collectives(), start_attempt(store, 1))
    again = partial(2)
    two.load(two.find_latest(), again, tensors_of(again))
    thawed = partial(1)
    train(thawed, range(1))
    save(two, thawed, 2)
    assert store.list(FROZEN) == ["step-000000001-a0001"]
    third = partial(1, initializer_range=1.0)
    three = CheckpointManager(store, checkpoints(), World(), Collectives(), start_attempt(store, 1))
    three.load(three.find_latest(), third, tensors_of(third))
    for name, parameter in third._parameters.items():
        assert torch.equal(parameter, thawed._parameters[name]), name


def test_newly_frozen_weights_are_written_and_unused_files_are_removed(store, attempt):
    one = attempt(keep_last=1)
    save(one, partial(1), 1)
    save(one, partial(2), 2)
    assert store.list(FROZEN) == ["step-000000002-a0001"]
    assert load_manifest(store, list_committed(store)[0]).frozen == tuple(
        sorted(partial(2).frozen_parameters())
    )


def test_shared_files_of_a_newer_attempt_are_not_removed(store, attempt, engine):
    save(attempt(), engine, 1)
    for name in ("step-000000007-a0009", "step-000000001-a0000"):
        store.write(f"{FROZEN}/{name}/rank-00000-0000.safetensors", b"x")
    remove_unused_shared_files(store, 1)
    assert sorted(store.list(FROZEN)) == ["step-000000001-a0001", "step-000000007-a0009"]


def test_a_damaged_shared_file_is_detected(store, attempt, engine):
    one = attempt()
    save(one, engine, 1)
    (path,) = [path for path in store.child(FROZEN).sizes() if path.endswith("0000.safetensors")][
        :1
    ]
    content = bytearray(store.read(f"{FROZEN}/{path}"))
    content[-1] ^= 1
    store.write(f"{FROZEN}/{path}", bytes(content))
    with pytest.raises(
        CheckpointError, match=re.escape("none of the 1 committed checkpoints can be loaded")
    ):
        one.load(one.find_latest(), engine, tensors_of(engine))


def test_a_lost_shared_file_fails_the_save_and_is_written_again(store, attempt, engine):
    one = attempt()
    save(one, engine, 1)
    store.remove(f"{FROZEN}/step-000000001-a0001")
    with pytest.raises(StorageError, match="has 0 bytes, but"):
        save(one, engine, 2)
    save(one, engine, 3)
    assert discovery.find_latest(store, World(), Collectives()).progress.step == 3


def test_a_failed_save_leaves_no_shared_files(store, attempt, engine, monkeypatch):
    real = Store.write

    def full(self: Store, path: str, content: Any) -> None:
        if path.startswith("rank-") and "/checkpoints/" in self.url:
            raise StorageError("the disk is full")
        real(self, path, content)

    monkeypatch.setattr(Store, "write", full)
    with pytest.raises(StorageError, match="the disk is full"):
        save(attempt(), engine, 1)
    assert store.list(FROZEN) == []


def test_a_failed_commit_does_not_write_shared_files_again(store, attempt, engine, monkeypatch):
    one = attempt()
    save(one, engine, 1)
    with monkeypatch.context() as patch:
        patch.setattr(
            Committer,
            "_write_manifest",
            lambda *_: (_ for _ in ()).throw(StorageError("no answer")),
        )
        with pytest.raises(StorageError, match="no answer"):
            save(one, engine, 2)
    save(one, engine, 3)
    assert store.list(FROZEN) == ["step-000000001-a0001"]


def test_shared_files_stay_if_their_manifest_cannot_be_removed(store, attempt, engine, monkeypatch):
    one, real = attempt(), Store.remove

    def refuses(self: Store, path: str) -> None:
        if path.endswith("manifest.json"):
            raise StorageError("no answer")
        real(self, path)

    def silent_after_the_commit(self: Fence, where: str) -> None:
        if list_committed(store):
            raise StorageError("no answer")

    monkeypatch.setattr(Fence, "require_current", silent_after_the_commit)
    monkeypatch.setattr(Store, "remove", refuses)
    with pytest.raises(StorageError, match="no answer"):
        save(one, engine, 1)
    monkeypatch.undo()
    again = attempt()
    assert again.load(again.find_latest(), engine, tensors_of(engine)).progress.step == 1


def test_manual_pruning_removes_unused_shared_files(store, attempt, engine):
    one = attempt()
    save(one, partial(1), 1)
    save(one, partial(2), 2)
    store.write(STORED, b"{}")
    assert len(store.list(FROZEN)) == 2
    assert catalog.prune(store.url, checkpoints(keep_last=1), remove=True) == [
        "step-000000001-a0001"
    ]
    assert store.list(FROZEN) == ["step-000000002-a0001"]
    assert "MiB shared, world 1" in catalog.describe(store.url)


@pytest.mark.parametrize("kind", ["list", "read"])
def test_unreachable_storage_does_not_damage_local_checkpoints(
    store, tmp_path, engine, kind, monkeypatch
):
    """Otherwise the run would fall back to an older one and remove the newer."""
    nodes = LocalTier(store, Store(str(tmp_path / "node")), "plain", World(), Collectives())
    one = CheckpointManager(
        store, checkpoints(), World(), Collectives(), start_attempt(store, 1), nodes
    )
    assert one.save(engine, replace(draft(engine, 1, ROWS), tier=Tier.LOCAL)).problem is None
    two = CheckpointManager(
        store, checkpoints(), World(), Collectives(), start_attempt(store, 1), nodes
    )
    manifest = two.find_latest()
    method = {"list": "sizes", "read": "read_into"}[kind]
    real = getattr(Store, method)

    def silent(self: Store, *values: Any) -> Any:
        if f"/{FROZEN}" in self.url:
            raise StorageError("no answer")
        return real(self, *values)

    monkeypatch.setattr(Store, method, silent)
    with pytest.raises(StorageError, match="no answer"):
        two.find_latest() if kind == "list" else two.load(manifest, engine, tensors_of(engine))
    monkeypatch.undo()
    assert two.load(two.find_latest(), engine, tensors_of(engine)).layout == "plain"


def test_local_checkpoints_use_the_shared_files(store, tmp_path, engine):
    attempt = start_attempt(store, 1)
    nodes = LocalTier(store, Store(str(tmp_path / "node")), "plain", World(), Collectives())
    one = CheckpointManager(store, checkpoints(), World(), Collectives(), attempt, nodes)
    train(engine, range(1))
    outcome = one.save(engine, replace(draft(engine, 1, ROWS), tier=Tier.LOCAL))
    assert outcome.problem is None and store.list(FROZEN) == ["step-000000001-a0001"]
    two = CheckpointManager(
        store, checkpoints(), World(), Collectives(), start_attempt(store, 1), nodes
    )
    second = partial(initializer_range=1.0)
    found = two.load(two.find_latest(), second, tensors_of(second))
    assert found.layout and all(
        torch.equal(p, engine._parameters[name]) for name, p in second._parameters.items()
    )


def test_a_run_without_frozen_weights_has_format_version_1(store, attempt, engine):
    save(attempt(), make_engine(), 1)
    assert load_manifest(store, list_committed(store)[0]).format_version == 1 and not store.list(
        FROZEN
    )
    assert issubclass(NewerFormatError, CheckpointError)
