"""The model a run begins with, where model.path is the folder of another run: that run's newest or best checkpoint.

It is exported once a node into the cache, under a name that follows from the checkpoint's manifest,
and is a model folder like any other from there on. Which checkpoint it was is kept with the run
that begins: a later start takes the same one, though the other run went on meanwhile. A run with
checkpoints of its own needs no weights from elsewhere; it has its model's config and tokenizer
itself. Does not read weights to look at a config.
"""

from __future__ import annotations

import contextlib
import json
import logging

from dist_ft.checkpoint import discovery
from dist_ft.checkpoint import manifest as manifests
from dist_ft.checkpoint.export import MODEL_FOLDER, export_run, find_best_step
from dist_ft.config.load import STORED
from dist_ft.config.schema import ModelSection, RunConfig
from dist_ft.core.errors import CheckpointError, ModelError, StorageError
from dist_ft.core.logs import redact
from dist_ft.core.world import Collectives, World, on_rank0
from dist_ft.model.loading.download import cache_folder
from dist_ft.storage.filesystem import Store

log = logging.getLogger("dist_ft.run")
INITIAL_CHECKPOINT = "began.json"
"""File of a run: the checkpoint of another run it began with."""


def is_run(path: str) -> bool:
    """Tell whether `path` is the folder of a run (hub names and model folders are not)."""
    return Store(path).exists(STORED)


def resolve_initial_model(
    config: RunConfig, store: Store, world: World, collectives: Collectives
) -> ModelSection:
    """Return the model section with a local folder as its path, where model.path names a run; a collective call.

    Raises:
        CheckpointError: that run has no sound checkpoint, or no longer the one this run began with.
    """
    cache = config.data.cache_dir
    if on_rank0(world, collectives, lambda: _is_under_way(config, store)):
        return _at(config.model, download_description(store.url, cache))
    if not on_rank0(
        world, collectives, lambda: is_run(config.model.path)
    ):  # else all would ask the store
        return config.model
    step = on_rank0(world, collectives, lambda: _chosen(config.model, store))
    if world.rank == 0:
        log.info("begins with step %d of %s", step, redact(config.model.path))
    return _at(config.model, export_to_cache(config.model.path, step, cache))


def resolve_for_inspection(config: RunConfig) -> ModelSection:
    """Return the model section with a local folder of config and tokenizer, where model.path names a run."""
    store = Store(config.run_url)
    with contextlib.suppress(
        StorageError
    ):  # of the run's own storage `preflight` says what is wrong
        if _is_under_way(config, store):
            return _at(config.model, download_description(store.url, config.data.cache_dir))
    if is_run(config.model.path):
        latest_step(config.model.path, config.model.checkpoint)
    return resolve_model_section(config.model, config.data.cache_dir, weights=False)


def _is_under_way(config: RunConfig, store: Store) -> bool:
    """Tell whether a run that began with another's model, or with a head to grow, has a checkpoint of its own."""
    return (config.task.grow_head or store.exists(INITIAL_CHECKPOINT)) and bool(
        discovery.list_committed(store)
    )


def resolve_model_section(
    section: ModelSection, cache_dir: str | None = None, weights: bool = True
) -> ModelSection:
    """Return the section with path a model folder, where it names a run's; without `weights` config and tokenizer."""
    if not is_run(section.path):
        return section
    step = latest_step(section.path, section.checkpoint) if weights else 0
    return _at(
        section,
        export_to_cache(section.path, step, cache_dir)
        if weights
        else download_description(section.path, cache_dir),
    )


def latest_step(url: str, which: str = "latest") -> int:
    """Return the step of the newest (or "best") checkpoint of the run at `url`."""
    store = Store(url)
    if not discovery.list_committed(store):
        raise ModelError(
            f"model.path={redact(url)}: is a run without a checkpoint yet; a run with one is needed; let "
            "it reach one"
        )
    if which == "best":
        return find_best_step(store)
    found = discovery.find_latest(store, World(), Collectives())
    assert found is not None  # one is committed; were none sound, `newest` had said so
    return found.progress.step


def export_to_cache(url: str, step: int, cache_dir: str | None = None) -> str:
    """Return the local folder with the model of a run's checkpoint, exported once a node (others wait)."""
    import xxhash
    from filelock import FileLock

    store = Store(url)
    name = next(
        (
            one
            for one in discovery.list_committed(store)
            if (manifests.parse_folder(one) or (-1,))[0] == step
        ),
        None,
    )
    if name is None:
        raise CheckpointError(
            f"model.path={redact(url)}: its checkpoint of step {step}, which this run began with, is "
            "gone; keep it (checkpoint.keep_every_steps), or begin a run of another run.name"
        )
    content = store.read(f"{discovery.FOLDER}/{name}/{manifests.NAME}")
    folder = (
        cache_folder(cache_dir)
        / "models"
        / f"run-{xxhash.xxh3_128_hexdigest(store.url.encode() + content)}"
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            export_run(url, str(folder), step=step)
    return str(folder)


def download_description(url: str, cache_dir: str | None = None) -> str:
    """Return a local folder with config and tokenizer of the run at `url`, without weights."""
    import xxhash
    from filelock import FileLock

    store = Store(url).child(MODEL_FOLDER)
    if not store.exists("config.json"):
        raise ModelError(
            f"model.path={redact(url)}: is a run that has not begun to train; a run with a checkpoint is "
            "needed; let it reach one"
        )
    key = store.url.encode() + store.read("config.json")
    folder = cache_folder(cache_dir) / "models" / f"described-{xxhash.xxh3_128_hexdigest(key)}"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not (folder / ".described").exists():
            store.download(str(folder))
            (folder / ".described").touch()
    return str(folder)


def _chosen(section: ModelSection, store: Store) -> int:
    """Return the step this run begins with, kept from its first start on (rank 0 only)."""
    if store.exists(INITIAL_CHECKPOINT):
        return int(json.loads(store.read(INITIAL_CHECKPOINT))["step"])
    step = latest_step(section.path, section.checkpoint)
    store.write(
        INITIAL_CHECKPOINT, json.dumps({"run": redact(section.path), "step": step}).encode()
    )
    return step


def _at(section: ModelSection, folder: str) -> ModelSection:
    return section.model_copy(update={"path": folder, "revision": None})
