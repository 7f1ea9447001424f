"""Saving and loading the checkpoints of one run.

Guarantees: a checkpoint exists when its manifest does, and the manifest is written last, by rank 0, after every file
was written and its length read back; a worker of an older attempt does not commit.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import version

import numpy as np
import torch

from dist_ft import failpoints
from dist_ft.checkpoint import catalogue
from dist_ft.checkpoint import manifest as manifests
from dist_ft.checkpoint.fragments import Fragment, Wanted, serialise
from dist_ft.checkpoint.ledger import write_segment
from dist_ft.checkpoint.manifest import FileEntry, LedgerEntry, Manifest, Progress, TensorInfo
from dist_ft.config.schema import CheckpointSection
from dist_ft.engine.base import Engine, Slot
from dist_ft.errors import CheckpointError, DistFtError, StorageError
from dist_ft.storage import Store
from dist_ft.world import Collectives, World, on_rank0, raise_together

log = logging.getLogger("dist_ft.checkpoint")


class CheckpointManager:
    """The checkpoints of the run at `store`, for one worker of one attempt."""

    def __init__(self, store: Store, section: CheckpointSection, world: World, collectives: Collectives,
                 attempt: int) -> None:
        self._store = store
        self._section = section
        self._world = world
        self._collectives = collectives
        self._attempt = attempt
        self._ledger: tuple[LedgerEntry, ...] = ()
        self._origin: int | None = None

    def newest(self) -> Manifest | None:
        """Return the newest sound checkpoint, the same on all ranks; this attempt's history goes on from it."""
        manifest = catalogue.newest(self._store, self._world, self._collectives)
        self._ledger = manifest.ledger if manifest else ()
        self._origin = manifest.progress.step if manifest else -1
        return manifest

    def load(self, manifest: Manifest, engine: Engine, tensors: dict[str, TensorInfo]) -> None:
        """Fill the engine's slots from a checkpoint of any world, stage or engine; `tensors` are the model's.

        Raises CheckpointError if it is another model's: flat offsets alone would fit a smaller one.
        """
        where = catalogue.checkpoint_store(self._store, manifest).shown()
        manifests.require_same_tensors(manifest.tensors, tensors, where)
        slots = list(engine.slots())
        wanted = [Wanted(i, slot.name, slot.key, slot.offset, slot.numel) for i, slot in enumerate(slots)]
        problem: DistFtError | None = None
        try:
            for index, values in catalogue.reader(self._store, manifest).read_many(wanted):
                slots[index].write(torch.from_numpy(values))
        except DistFtError as error:
            problem = error
        raise_together(self._collectives, problem)
        engine.finish_load(manifest.progress.optimizer_step)

    def save(self, engine: Engine, progress: Progress, ledger_rows: np.ndarray, *, run: str, aliases: dict[str, str],
             tensors: dict[str, TensorInfo], evaluation: dict[str, float]) -> str:
        """Commit a checkpoint and return its URL; a collective call. Raises on all ranks if any rank fails."""
        name = manifests.folder_name(progress.step, self._attempt)
        folder = self._store.child(f"{catalogue.FOLDER}/{name}")
        try:
            self._save(folder, engine, progress, ledger_rows, run, aliases, tensors, evaluation)
        except StorageError:
            if self._world.rank == 0:
                self._remove([name])  # on a full disk the next one needs the room
            raise
        if self._world.rank == 0:
            self._prune(name)
        return folder.url

    def _save(self, folder: Store, engine: Engine, progress: Progress, ledger_rows: np.ndarray, run: str,
              aliases: dict[str, str], tensors: dict[str, TensorInfo], evaluation: dict[str, float]) -> None:
        """Write files, agree, commit."""
        entries: list[FileEntry] = []
        problem: DistFtError | None = None
        try:
            entries = write_files(folder, list(engine.slots()), self._world.rank)
        except DistFtError as error:
            problem = error
        raise_together(self._collectives, problem)
        gathered = self._collectives.gather((entries, ledger_rows)) or []

        def commit() -> None:
            ledger = self._extend_ledger(progress.step, [rows for _, rows in gathered])
            self._commit(folder, Manifest(
                format_version=manifests.FORMAT_VERSION, run=run, attempt=self._attempt,
                world_size=self._world.size, engine=type(engine).__name__, progress=progress, tensors=tensors,
                aliases=aliases, files=tuple(item for part, _ in gathered for item in part),
                ledger=ledger, evaluation=evaluation,
                created_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
                versions={name: version(name) for name in ("torch", "transformers", "safetensors")}))
            self._ledger = ledger

        on_rank0(self._world, self._collectives, commit)

    def _extend_ledger(self, step: int, parts: Sequence[np.ndarray]) -> tuple[LedgerEntry, ...]:
        start = self._ledger[-1].stop if self._ledger else 0
        if step == start:
            return self._ledger
        return (*self._ledger, write_segment(self._store, start, step, self._attempt, parts))

    def _commit(self, folder: Store, manifest: Manifest) -> None:
        """Write the manifest, unless a newer attempt has started meanwhile."""
        failpoints.hit("checkpoint.before_manifest")
        newest = catalogue.newest_attempt(self._store)
        if newest > self._attempt:
            raise CheckpointError(f"{folder.shown()}: attempt {self._attempt} must not commit, attempt {newest} has "
                                  "taken over the run; this process ends")
        for item in manifest.files:
            if folder.size(item.path) != item.num_bytes:
                raise StorageError(f"{folder.shown(item.path)}: {folder.size(item.path)} bytes are there, "
                                   f"{item.num_bytes} were written; the storage lost some; checkpoint not committed")
        folder.write(manifests.NAME, manifests.seal(manifest))
        failpoints.hit("checkpoint.after_manifest")

    def _prune(self, newest: str) -> None:
        """Remove checkpoints that retention does not keep, those this attempt passed over, and torn ones."""
        try:
            names = catalogue.committed(self._store)
            history = [name for name in names if not self._passed_over(name)]
            keep = {*kept(history, self._section), newest}
            torn = [name for name in self._store.list(catalogue.FOLDER)
                    if name not in names and _attempt(name) <= self._attempt]
            self._remove([name for name in names if name not in keep] + torn)
        except StorageError as error:
            log.warning("old checkpoints were not removed: %s", error)

    def _passed_over(self, name: str) -> bool:
        """Tell whether a checkpoint is newer than the one this attempt went on from, and not its own."""
        step, attempt = manifests.parse_folder(name) or (0, 0)
        return self._origin is not None and attempt < self._attempt and step > self._origin

    def _remove(self, names: Sequence[str]) -> None:
        """Remove checkpoints, manifests first; what can not be removed is logged."""
        for name in names:
            try:
                self._store.remove(f"{catalogue.FOLDER}/{name}/{manifests.NAME}")
                self._store.remove(f"{catalogue.FOLDER}/{name}")
            except StorageError as error:
                log.warning("checkpoint %s was not removed: %s", name, error)


def _attempt(name: str) -> int:
    parsed = manifests.parse_folder(name)
    return parsed[1] if parsed else 2**31


def kept(names: Sequence[str], section: CheckpointSection) -> list[str]:
    """Return which of `names` (newest first) retention keeps."""
    steps = {name: (manifests.parse_folder(name) or (0, 0))[0] for name in names}
    every = section.keep_every_steps
    return [name for i, name in enumerate(names) if i < section.keep_last or (every and steps[name] % every == 0)]


def write_files(folder: Store, slots: Sequence[Slot], rank: int) -> list[FileEntry]:
    """Write the slots this worker owns and return the manifest's entries for them."""
    fragments = (Fragment(slot.name, slot.key, slot.offset, to_numpy(slot.read())) for slot in slots if slot.owned)
    entries = []
    for part, content in enumerate(serialise(fragments)):
        path = f"rank-{rank:05d}-{part:04d}.safetensors"
        failpoints.hit("checkpoint.before_file", rank)
        folder.write(path, content)
        failpoints.hit("checkpoint.after_file", rank)
        entries.append(manifests.entry(path, content))
    return entries


def to_numpy(values: torch.Tensor) -> np.ndarray:
    """Return a slot's values on the host; bfloat16, which numpy lacks, as float32 (exact)."""
    values = values.detach()
    return (values.float() if values.dtype == torch.bfloat16 else values).cpu().contiguous().numpy()
