"""Decides which checkpoints in storage are retained, and removes the others.

The manifest of a checkpoint is removed first, so that a partly removed checkpoint does not count as
one.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence

from dist_ft.checkpoint import discovery
from dist_ft.checkpoint import manifest as manifests
from dist_ft.checkpoint.manifest import CheckpointName
from dist_ft.checkpoint.tier import Tier
from dist_ft.config.schema import CheckpointSection
from dist_ft.core.errors import CheckpointError, StorageError
from dist_ft.metrics import best
from dist_ft.storage.filesystem import Store

log = logging.getLogger("dist_ft.checkpoint")
_NO_CHECKPOINT = CheckpointName(step=0, attempt=2**31)
"""Stands for a folder that is not a checkpoint. Its attempt is later than any real one."""


def select_retained(
    names: Sequence[str], section: CheckpointSection, ranks: Mapping[str, float]
) -> list[str]:
    """Return the checkpoints to retain.

    Args:
        names: all checkpoints, latest first.
        section: the retention settings.
        ranks: rank of the evaluated checkpoints (`rank_by_evaluation`), lowest is best.
    """
    # The sort is stable: of equally good checkpoints the latest one is retained.
    ranked = sorted((name for name in names if name in ranks), key=lambda name: ranks[name])
    best_names = ranked[: section.keep_best]
    every = section.keep_every_steps

    retained = []
    for index, name in enumerate(names):
        is_recent = index < section.keep_last
        is_milestone = bool(every) and _parse(name).step % every == 0
        if is_recent or name in best_names or is_milestone:
            retained.append(name)

    return retained


def rank_by_evaluation(
    store: Store, names: Sequence[str], section: CheckpointSection
) -> dict[str, float]:
    """Return the rank of each evaluated checkpoint by section.best_by, lowest is best.

    Empty unless the settings retain the best checkpoints.
    """
    if not section.keep_best:
        return {}

    ranks = {}
    for name in names:
        try:
            evaluation = discovery.load_manifest(store, name).evaluation
        except CheckpointError as error:
            log.warning("checkpoint %s: its evaluation is unknown: %s", name, error)
            continue

        # NaN stands for "not evaluated", and a loss may be NaN too: neither is a candidate.
        rank = best.sort_key(section.best_by, evaluation.get(section.best_by, math.nan))
        if math.isfinite(rank):
            ranks[name] = rank

    return ranks


def remove_unretained(
    store: Store, section: CheckpointSection, attempt: int, start_step: int | None, latest: str
) -> None:
    """Remove checkpoints that are not retained, incomplete ones, and those superseded by `attempt`.

    Checkpoints that cannot be removed are logged.

    Args:
        store: the run's folder.
        section: the retention settings.
        attempt: the current attempt.
        start_step: the step that `attempt` resumed from, -1 if from none; None if unknown.
        latest: the checkpoint just committed, which is always retained.
    """

    def is_superseded(name: str) -> bool:
        """Whether an older attempt wrote it after the step that this attempt resumed from."""
        step, number = _parse(name)
        return start_step is not None and number < attempt and step > start_step

    try:
        # Superseded checkpoints do not count for keep_last: this attempt repeats their steps.
        names = discovery.list_committed(store)
        current = [name for name in names if not is_superseded(name)]
        ranks = rank_by_evaluation(store, current, section)
        retained = {*select_retained(current, section, ranks), latest}

        # A folder of a newer attempt without a manifest may be a save that is being written.
        unretained = [name for name in names if name not in retained]
        incomplete: list[str] = []
        for name in store.list(discovery.FOLDER):
            if name not in names and _parse(name).attempt <= attempt:
                incomplete.append(name)

        # Shared files last: until then a manifest may refer to them.
        remove_checkpoints(store, unretained + incomplete)
        remove_unused_shared_files(store, attempt)
    except StorageError as error:
        # The new checkpoint is committed all the same. The next save tries again.
        log.warning("old checkpoints were not removed: %s", error)


def remove_unused_shared_files(store: Store, attempt: int) -> None:
    """Remove files of frozen weights, of attempts up to `attempt`, that no checkpoint uses."""
    folders = store.list(discovery.FROZEN)
    # The usual case, in which no manifest has to be read: a single folder is the one in use.
    if len(folders) < 2:
        return

    # With one unreadable manifest it is unknown which files it refers to, so all of them stay.
    try:
        used = _shared_folders_in_use(store)
    except CheckpointError as error:
        log.warning("unused files of frozen weights were not removed: %s", error)
        return

    for name in folders:
        if name not in used and _parse(name).attempt <= attempt:
            store.remove(f"{discovery.FROZEN}/{name}")


def _shared_folders_in_use(store: Store) -> set[str]:
    """Return the folders of shared files that some checkpoint of the run refers to."""
    used: set[str] = set()
    for tier in Tier:
        for name in discovery.list_committed(store, tier):
            files = discovery.load_manifest(store, name, tier).files
            # The path starts with the name of the checkpoint that wrote the file.
            used.update(item.path.split("/")[0] for item in files if item.shared)

    return used


def remove_checkpoints(store: Store, names: Sequence[str], tier: Tier = Tier.STORAGE) -> bool:
    """Remove checkpoints, manifests first; return whether all are removed. Failures are logged."""
    all_removed = True
    for name in names:
        try:
            store.remove(f"{tier.value}/{name}/{manifests.NAME}")
            store.remove(f"{tier.value}/{name}")
        except StorageError as error:
            all_removed = False
            log.warning("checkpoint %s was not removed: %s", name, error)

    return all_removed


def _parse(name: str) -> CheckpointName:
    """Return step and attempt of a checkpoint's folder; _NO_CHECKPOINT if `name` is not one."""
    return manifests.parse_folder(name) or _NO_CHECKPOINT
