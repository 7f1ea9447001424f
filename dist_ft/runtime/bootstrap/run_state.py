"""Where a run stands, read from its storage, and the attempt that takes it over."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

import numpy as np

from dist_ft.checkpoint import discovery
from dist_ft.checkpoint.ledger import read_segment
from dist_ft.checkpoint.local_tier import LocalTier
from dist_ft.checkpoint.manifest import Manifest, parse_folder
from dist_ft.checkpoint.stored_files import model_is_stored
from dist_ft.config.load import STORED, check_resume, read_stored_config, resolved_yaml
from dist_ft.config.schema import RunConfig
from dist_ft.core import private_folders
from dist_ft.core.errors import (
    CheckpointError,
    DataError,
    DistFtError,
    FolderError,
    StorageError,
)
from dist_ft.core.world import Collectives, World, on_rank0, raise_together
from dist_ft.data.batching.loader import Loader
from dist_ft.data.batching.stream_loader import StreamLoader
from dist_ft.data.blocks.slice_store import short_checksum
from dist_ft.metrics import best
from dist_ft.storage import filesystem
from dist_ft.storage.filesystem import Store
from dist_ft.training.metrics_log import FILE as METRICS_FILE
from dist_ft.training.metrics_log import read_metrics

log = logging.getLogger("dist_ft.run")
NUM_COMPARED_SLICES = 4
"""Slices in the ledger that are compared with a stream that was described again."""
NUM_COMPARED_STEPS = 4
"""Steps before a checkpoint whose samples are compared with an index that was built again."""


def require_same_run(store: Store, config: RunConfig) -> None:
    """Raise ConfigError if the run exists with another identity.

    Log other changes (rank 0 only).
    """
    if not store.exists(STORED):
        if discovery.list_committed(store):
            log.warning(
                "%s is missing: whether this config is that of the run cannot be checked. It is "
                "written again from this config",
                store.redacted_url(STORED),
            )
        return
    for change in check_resume(read_stored_config(store), config):
        log.info(
            "since the run started, %s changed from %s to %s", change.path, change.old, change.new
        )


def start_attempt(
    store: Store, config: RunConfig, world: World, previous_end: str = "", known: int = 0
) -> int:
    """Take an attempt number (rank 0 only): from now on no earlier attempt can commit.

    Called as late as possible, but before the latest checkpoint is looked up: a second start by
    mistake that fails early must not cost the first one its work, and the checkpoint this attempt
    resumes from must stay the latest.

    Args:
        store: storage of the run.
        config: the config as the user gave it; stored with the run.
        world: the workers of this attempt.
        previous_end: why the attempt before ended; noted with this one.
        known: an attempt number that the nodes know of (`find_local_attempt`).
    """
    attempt = discovery.start_attempt(store, world.num_ranks, previous_end, known)

    # Earlier attempts may have been killed in the middle of a write. A worker of one that is still
    # alive holds a lock on what it writes.
    store.remove_leftovers()

    # After the number: a start that failed before it leaves the stored config as it was.
    store.write(STORED, resolved_yaml(config).encode())

    return attempt


def build_local_tier(
    config: RunConfig, store: Store, world: World, collectives: Collectives
) -> LocalTier | None:
    """Return where this worker's node stores checkpoints of the run.

    None if the config has no such folder. A collective call.

    Raises:
        FolderError: on some node others own the folder or may write to it.
    """
    if not config.checkpoint.local_folder:
        return None

    # the hash separates runs of one name in two buckets
    key = hashlib.sha256(config.run_url.encode()).hexdigest()[:16]
    name = f"{config.run.name}-{key}"
    _create_local_folder(config, name, collectives)
    folder = Store(f"{config.checkpoint.local_folder}/{name}")

    # Workers store only their own parts locally, so the files fit no other layout.
    stage = f"zero-{config.zero.stage}" if config.max_workers else "plain"
    layout = f"{stage}, {world.num_ranks} workers"

    # Attempts before may have been killed in the middle of a write on this node.
    folder.remove_leftovers()

    return LocalTier(store, folder, layout, world, collectives)


def _create_local_folder(config: RunConfig, name: str, collectives: Collectives) -> None:
    """Create the run's private folder on this node; all ranks raise if one cannot."""
    problem: DistFtError | None = None
    try:
        local_folder = Path(filesystem.local_path(config.checkpoint.local_folder))
        private_folders.open_part(local_folder, name, "checkpoint.local_folder")
    except FolderError as error:
        problem = error
    raise_together(collectives, problem)


def find_local_attempt(local: LocalTier | None, collectives: Collectives) -> int:
    """Return the highest attempt number of the local checkpoints of all nodes; a collective call.

    0 without any.
    """
    own = 0
    if local is not None:
        own = local.latest_attempt()
    return max(collectives.all_gather(own))


def find_final_checkpoint(
    config: RunConfig, store: Store, world: World, collectives: Collectives, total_steps: int
) -> Manifest | None:
    """Return the checkpoint of the last step if it is committed and sound, else None.

    A collective call.

    The last step may be one at which the run ended early. Takes no attempt number.
    """
    names = on_rank0(world, collectives, lambda: discovery.list_committed(store))
    if not names:
        return None

    # A run that lost what its checkpoints need gets it back by another attempt, which stores it.
    if not on_rank0(world, collectives, lambda: store.exists(STORED) and model_is_stored(store)):
        return None

    # The step is part of the name, so an unfinished run is recognized without reading files.
    step = (parse_folder(names[0]) or (0, 0))[0]
    is_final = step >= total_steps
    if not is_final and not on_rank0(world, collectives, lambda: _ended_early(config, store, step)):
        return None

    manifest: Manifest | None = None
    try:
        manifest = discovery.load_manifest(store, names[0])
        discovery.verify_checksums(store, manifest, world)
    except DistFtError:
        manifest = None  # `CheckpointManager.find_latest` reports why

    # Each rank verified its share of the files: the checkpoint is sound if all shares are.
    is_sound = all(collectives.all_gather(manifest is not None))
    return manifest if is_sound else None


def require_same_data(
    config: RunConfig, loader: Loader | StreamLoader, store: Store, manifest: Manifest
) -> None:
    """Raise DataError if the data differs from what was trained up to a checkpoint (rank 0 only).

    For a run that lost its index or the description of its stream: what was built again is the
    same only if the data is.
    """
    if bool(manifest.cursors) != isinstance(loader, StreamLoader):
        raise DataError(
            "data.train: the run lost how its data is ordered (files of data/), and what was built "
            "again is another order, so that the run cannot continue. Restore data/ from a copy, "
            "or use another run.name."
        )
    if not manifest.ledger:
        return

    try:
        rows = read_segment(store, manifest.ledger[-1])
    except (StorageError, CheckpointError) as error:
        log.warning("the index was built again, and cannot be compared with the ledger: %s", error)
        return

    if isinstance(loader, StreamLoader):
        _require_same_slices(loader, rows.slices)
    else:
        _require_same_samples(config, loader, rows.samples)


def _require_same_slices(loader: StreamLoader, facts: np.ndarray) -> None:
    """Raise DataError if slices differ from their facts (M, 5) in the ledger."""
    for number, *_, checksum in facts[-NUM_COMPARED_SLICES:].tolist():
        is_known = number < loader.store.slices.count
        if not is_known or short_checksum(loader.store.read(number)) != checksum:
            raise DataError(
                "data.train: the description of the run's stream was lost, and with the one that "
                "was built again other rows come than the run was trained on: the data or its "
                "settings changed. Restore data/ from a copy, or use another run.name."
            )


def _require_same_samples(config: RunConfig, loader: Loader, rows: np.ndarray) -> None:
    """Raise DataError if the plan differs from the rows (N, 6) of the ledger."""
    for step in np.unique(rows[:, 0])[-NUM_COMPARED_STEPS:].tolist():
        trained = rows[rows[:, 0] == step][:, [2, 3, 4, 5, 1]]  # lane, sample, token, length, epoch
        planned = []
        for batch in loader.batches(step, range(config.num_lanes)):
            for segment in batch.segments.tolist():  # sample, token, length, epoch
                planned.append([batch.lane, *segment])

        if sorted(trained.tolist()) != sorted(planned):
            raise DataError(
                f"data.train: the run's index was lost, and the one that was built again gives "
                f"other samples at step {step} than the run was trained on: the data has changed. "
                "Restore the data or the index, or use another run.name."
            )


def evaluation_history(config: RunConfig, lines: list[dict[str, Any]]) -> list[tuple[int, float]]:
    """Return (step, value) of checkpoint.best_by at every evaluation in metrics.jsonl."""
    metric = config.checkpoint.best_by

    values: dict[int, float] = {}  # by step; of several lines of a step the last one counts
    for line in lines:
        if line["kind"] == "evaluation" and metric in line:
            value = line[metric]
            # The file has null for NaN and infinity, which JSON lacks.
            values[line["step"]] = float("nan") if value is None else value

    return sorted(values.items())


def _ended_early(config: RunConfig, store: Store, step: int) -> bool:
    """Return whether early stopping ended the run at `step`, its latest (rank 0 only)."""
    patience = config.evaluation.patience
    if not patience:
        return False

    # Without the evaluations so far, the run would train on where it should end. A step that is
    # logged leaves a line.
    lines = read_metrics(store, step)
    is_lost = not store.exists(METRICS_FILE) or (not lines and 0 < config.log.every_steps <= step)
    if step and is_lost:
        raise CheckpointError(
            f"{store.redacted_url(METRICS_FILE)}: the file is missing or empty, and "
            f"evaluation.patience={patience} needs the evaluations up to step {step}. Restore it "
            "from a copy, or set evaluation.patience=0."
        )

    # A later step than the last evaluation means that training continued after it.
    history = evaluation_history(config, lines)
    if not history or history[-1][0] != step:
        return False
    return best.should_stop_early(config.checkpoint.best_by, history, patience)
