"""Which checkpoints in storage stay, and removing the others: manifests first, so that none is ever half there."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence

from dist_ft.checkpoint import discovery
from dist_ft.checkpoint import manifest as manifests
from dist_ft.config.schema import CheckpointSection
from dist_ft.core.errors import CheckpointError, StorageError
from dist_ft.metrics import best
from dist_ft.storage.filesystem import Store

log = logging.getLogger("dist_ft.checkpoint")


def select_retained(names: Sequence[str], section: CheckpointSection, ranks: Mapping[str, float]) -> list[str]:
    """Return which of `names` (newest first) retention keeps; the lower a rank (`held_out`), the better."""
    every = section.keep_every_steps
    chosen = sorted((name for name in names if name in ranks), key=lambda name: ranks[name])[
        : section.keep_best
    ]
    return [
        name
        for i, name in enumerate(names)
        if i < section.keep_last or name in chosen or (every and _of(name)[0] % every == 0)
    ]


def rank_by_evaluation(store: Store, names: Sequence[str], section: CheckpointSection) -> dict[str, float]:
    """Return the rank of each checkpoint by section.best_by, where known; none where retention does not ask."""
    ranks = {}
    for name in names if section.keep_best else ():
        try:
            evaluation = discovery.load_manifest(store, name).evaluation
        except CheckpointError as error:
            log.warning("checkpoint %s: its evaluation is not known: %s", name, error)
            continue
        found = best.rank(section.best_by, evaluation.get(section.best_by, math.nan))
        if math.isfinite(found):
            ranks[name] = found
    return ranks


def remove_unretained(
    store: Store, section: CheckpointSection, attempt: int, origin: int | None, newest: str
) -> None:
    """Remove checkpoints that retention does not keep, torn ones, and those that `attempt` passed over.

    `attempt` went on from step `origin`; `newest` is its own last one and stays. What can not be removed is logged.
    """

    def passed_over(name: str) -> bool:
        """Tell whether a checkpoint is newer than what this attempt went on from, and not its own."""
        step, number = _of(name)
        return origin is not None and number < attempt and step > origin

    try:
        names = discovery.list_committed(store)
        own = [name for name in names if not passed_over(name)]
        keep = {*select_retained(own, section, rank_by_evaluation(store, own, section)), newest}
        torn = [
            name
            for name in store.list(discovery.FOLDER)
            if name not in names and _of(name)[1] <= attempt
        ]
        remove_checkpoints(store, [name for name in names if name not in keep] + torn)
        remove_unused_shared_files(store, attempt)
    except StorageError as error:
        log.warning("old checkpoints were not removed: %s", error)


def remove_unused_shared_files(store: Store, attempt: int) -> None:
    """Remove files of frozen weights that no checkpoint names, of attempts up to `attempt`."""
    folders = store.list(discovery.FROZEN)
    if len(folders) < 2:
        return
    try:
        named = {
            item.path.split("/")[0]
            for folder in (discovery.FOLDER, discovery.LOCAL_FOLDER)
            for name in discovery.list_committed(store, folder)
            for item in discovery.load_manifest(store, name, folder).files
            if item.shared
        }
    except CheckpointError as error:
        log.warning("files of frozen weights are not tidied up: %s", error)
        return
    for name in folders:
        if name not in named and _of(name)[1] <= attempt:
            store.remove(f"{discovery.FROZEN}/{name}")


def remove_checkpoints(store: Store, names: Sequence[str], folder: str = discovery.FOLDER) -> bool:
    """Remove checkpoints, manifests first; what can not be removed is logged. Return whether all are gone."""
    all_gone = True
    for name in names:
        try:
            store.remove(f"{folder}/{name}/{manifests.NAME}")
            store.remove(f"{folder}/{name}")
        except StorageError as error:
            all_gone = False
            log.warning("checkpoint %s was not removed: %s", name, error)
    return all_gone


def _of(name: str) -> tuple[int, int]:
    """Return (step, attempt) of a checkpoint; what is none is of no attempt that ever was."""
    return manifests.parse_folder(name) or (0, 2**31)
