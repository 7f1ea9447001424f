"""Resolves the initial model of a run whose model.path is the folder of another run.

The latest or best checkpoint of that run is exported once per node into the cache, under a name
derived from the checkpoint's manifest. From there on it is a model folder like any other. The run
records which checkpoint it started from, so that later starts use the same one even if the other
run has continued meanwhile.

A run with checkpoints of its own needs no weights from elsewhere, and has its model's config and
tokenizer itself. To inspect a config, no weights are read.
"""

from __future__ import annotations

import contextlib
import json
import logging
from pathlib import Path

from dist_ft.checkpoint import discovery
from dist_ft.checkpoint import manifest as manifests
from dist_ft.checkpoint.export import ExportOptions, export_run
from dist_ft.checkpoint.stored_files import MODEL_FOLDER, find_lost_model_file
from dist_ft.checkpoint.trained_model import find_best_step
from dist_ft.config.load import STORED
from dist_ft.config.schema import ModelSection, RunConfig
from dist_ft.core.errors import CheckpointError, ModelError, StorageError
from dist_ft.core.logs import redact
from dist_ft.core.world import Collectives, World, on_rank0
from dist_ft.model.loading.download import cache_folder, create_in_cache
from dist_ft.storage import local_files
from dist_ft.storage.documents import MAX_BYTES, MAX_LARGE_BYTES
from dist_ft.storage.filesystem import Store
from dist_ft.storage.stored_json import read_stored_json

log = logging.getLogger("dist_ft.run")
INITIAL_CHECKPOINT = "began.json"
"""File of a run that records the checkpoint of another run it started from."""


def is_run(path: str) -> bool:
    """Whether `path` is the folder of a run, not a hub name or a model folder."""
    store = Store(path)
    # Also without its config, so that it is refused as a run that lost it, not as another folder.
    return store.exists(STORED) or bool(discovery.list_committed(store))


def resolve_initial_model(
    config: RunConfig, store: Store, world: World, collectives: Collectives
) -> ModelSection:
    """Return the model section with a model folder as its path, if model.path is a run.

    A collective call.

    Raises:
        CheckpointError: the other run has no undamaged checkpoint, or the one that this run started
            from was removed.
    """
    cache_dir = config.data.cache_dir
    if on_rank0(world, collectives, lambda: _has_own_model(config, store)):
        return _with_path(config.model, download_description(store.url, cache_dir))

    # On rank 0 only, so that not all ranks send a request to the storage.
    if not on_rank0(world, collectives, lambda: is_run(config.model.path)):
        return config.model

    # The other run may commit a checkpoint between two listings, so one rank chooses for all.
    step = on_rank0(world, collectives, lambda: _choose_step(config.model, store))
    if world.rank == 0:
        log.info("starting from step %d of %s", step, redact(config.model.path))
    return _with_path(config.model, export_to_cache(config.model.path, step, cache_dir))


def resolve_for_inspection(config: RunConfig) -> ModelSection:
    """Return the model section with a local folder as its path, if model.path is a run.

    The folder has the config and tokenizer, but no weights.
    """
    store = Store(config.run_url)
    # The preflight checks report errors of the run's storage.
    with contextlib.suppress(StorageError):
        if _has_own_model(config, store):
            folder = download_description(store.url, config.data.cache_dir)
            return _with_path(config.model, folder)

    if is_run(config.model.path):
        # Only to raise an error if there is no checkpoint.
        latest_step(config.model.path, config.model.checkpoint)
    return resolve_model_section(config.model, config.data.cache_dir, weights=False)


def _has_own_model(config: RunConfig, store: Store) -> bool:
    """Whether a run that started from another run, or grew its head, has a checkpoint."""
    changed_model = config.task.grow_head or store.exists(INITIAL_CHECKPOINT)
    if not changed_model or not discovery.list_committed(store):
        return False

    # Should its model's folder be lost, the model is derived again as on the first start.
    return not find_lost_model_file(store)


def resolve_model_section(
    section: ModelSection, cache_dir: str | None = None, weights: bool = True
) -> ModelSection:
    """Return the section with a model folder as its path, if the path is a run.

    Args:
        section: names a model or a run.
        cache_dir: where model folders are stored.
        weights: provide the weights, not only config and tokenizer.
    """
    if not is_run(section.path):
        return section
    if not weights:
        return _with_path(section, download_description(section.path, cache_dir))

    step = latest_step(section.path, section.checkpoint)
    return _with_path(section, export_to_cache(section.path, step, cache_dir))


def latest_step(url: str, which: str = "latest") -> int:
    """Return the step of the latest (or "best") checkpoint of the run at `url`."""
    store = Store(url)
    if not discovery.list_committed(store):
        raise ModelError(
            f"model.path={redact(url)}: is a run without a checkpoint yet. A run with a checkpoint "
            "is required. Wait until it has one."
        )
    if which == "best":
        return find_best_step(store)

    # A checkpoint is committed, and `find_latest` raises an error if all are damaged.
    latest = discovery.find_latest(store, World(), Collectives())
    assert latest is not None
    return latest.progress.step


def export_to_cache(url: str, step: int, cache_dir: str | None = None) -> str:
    """Return the local folder with the model of a run's checkpoint.

    The first process of a node exports it; the others wait.
    """
    import xxhash

    store = Store(url)
    name = _find_checkpoint(store, step)
    if name is None:
        raise CheckpointError(
            f"model.path={redact(url)}: its checkpoint of step {step}, from which this run "
            "started, was removed. It must exist as long as this run is resumed. Start a run of "
            "another run.name; next time, retain the checkpoint (checkpoint.keep_every_steps)."
        )

    # The manifest has the checksums of all files, so its hash names the weights themselves.
    path = f"{discovery.FOLDER}/{name}/{manifests.NAME}"
    manifest = store.read_at_most(path, MAX_LARGE_BYTES)
    digest = xxhash.xxh3_128_hexdigest(store.url.encode() + manifest)
    folder = _models_folder(cache_dir) / f"run-{digest}"
    with local_files.locked(f"{folder}.lock"):
        # An export appears whole or not at all, so a folder that exists is complete.
        if not folder.exists():
            export_run(url, str(folder), ExportOptions(step=step))
    return str(folder)


def _find_checkpoint(store: Store, step: int) -> str | None:
    """Return the name of the latest checkpoint of `step`, None if there is none."""
    for name in discovery.list_committed(store):
        parsed = manifests.parse_folder(name)
        if parsed is not None and parsed.step == step:
            return name
    return None


def download_description(url: str, cache_dir: str | None = None) -> str:
    """Return a local folder with config and tokenizer of the run at `url`, without weights."""
    import xxhash

    store = Store(url).child(MODEL_FOLDER)
    if not store.exists("config.json"):
        raise ModelError(
            f"model.path={redact(url)}: is a run that has not started to train. A run with a "
            "checkpoint is required. Wait until it has one."
        )

    config = store.read_at_most("config.json", MAX_BYTES)
    digest = xxhash.xxh3_128_hexdigest(store.url.encode() + config)
    folder = _models_folder(cache_dir) / f"described-{digest}"
    # Unlike an export, a download may stop half-way. This file is written at its end.
    is_complete = folder / ".described"
    create_in_cache(folder)
    with local_files.locked(f"{folder}.lock"):
        if not is_complete.exists():
            store.download(str(folder))
            is_complete.touch()
    return str(folder)


def _models_folder(cache_dir: str | None) -> Path:
    return cache_folder(cache_dir, "models")


def _choose_step(section: ModelSection, store: Store) -> int:
    """Return the step that this run starts from, as recorded at its first start (rank 0 only)."""
    if store.exists(INITIAL_CHECKPOINT):
        return _recorded_step(store)

    step = latest_step(section.path, section.checkpoint)
    record = {"run": redact(section.path), "step": step}
    store.write(INITIAL_CHECKPOINT, json.dumps(record).encode())
    return step


def _recorded_step(store: Store) -> int:
    remedy = "Restore it from a copy, or move the run's folder away to start again."
    record = read_stored_json(store, INITIAL_CHECKPOINT, dict, remedy)
    step = record.get("step")
    if not isinstance(step, int):
        raise CheckpointError(
            f"{store.redacted_url(INITIAL_CHECKPOINT)}: the file is damaged (it holds no step). "
            f"{remedy}"
        )
    return step


def _with_path(section: ModelSection, folder: str) -> ModelSection:
    # A revision is one of a hub repository, which a local folder has not.
    return section.model_copy(update={"path": folder, "revision": None})
