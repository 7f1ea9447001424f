"""Where a run stands, read from its storage, and the attempt that takes it over."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

from dist_ft.checkpoint import discovery
from dist_ft.checkpoint.local_tier import LocalTier
from dist_ft.checkpoint.manifest import Manifest, parse_folder
from dist_ft.config.load import STORED, check_resume, read_stored_config, resolved_yaml
from dist_ft.config.schema import RunConfig
from dist_ft.core import private_folders
from dist_ft.core.errors import DistFtError, FolderError
from dist_ft.core.world import Collectives, World, on_rank0, raise_together
from dist_ft.metrics import best
from dist_ft.storage import filesystem
from dist_ft.storage.filesystem import Store
from dist_ft.training.metrics_log import read_metrics

log = logging.getLogger("dist_ft.run")


def require_same_run(store: Store, config: RunConfig) -> None:
    """Raise ConfigError if the run exists with another identity.

    Log other changes (rank 0 only).
    """
    if not store.exists(STORED):
        return
    for change in check_resume(read_stored_config(store), config):
        log.info(
            "since the run started, %s changed from %s to %s", change.path, change.old, change.new
        )


def start_attempt(store: Store, config: RunConfig, world: World, previous_end: str = "") -> int:
    """Take an attempt number (rank 0 only): from now on no earlier attempt can commit.

    Called as late as possible, but before the latest checkpoint is looked up: a second start by
    mistake that fails early must not cost the first one its work, and the checkpoint this attempt
    resumes from must stay the latest.

    Args:
        store: storage of the run.
        config: the config as the user gave it; stored with the run.
        world: the workers of this attempt.
        previous_end: why the attempt before ended; noted with this one.
    """
    attempt = discovery.start_attempt(store, world.num_ranks, previous_end)

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

    # A later step than the last evaluation means that training continued after it.
    history = evaluation_history(config, read_metrics(store, step))
    if not history or history[-1][0] != step:
        return False
    return best.should_stop_early(config.checkpoint.best_by, history, patience)
