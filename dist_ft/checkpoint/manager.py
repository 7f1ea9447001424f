"""Saving and loading the checkpoints of one run.

Guarantees: a checkpoint exists when its manifest does, and the manifest is written last, by rank 0, after every file
was written and its length read back; a worker of an older attempt does not commit. In the background a save goes
through the same two steps: all ranks learn that all files are written, then rank 0 commits; that a rank is ready
travels with the sum each training step makes anyway (`flags`, `advance`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from datetime import datetime, timezone
from importlib.metadata import version

import numpy as np
import torch

from dist_ft import failpoints
from dist_ft.checkpoint import catalogue
from dist_ft.checkpoint import manifest as manifests
from dist_ft.checkpoint.fragments import Wanted
from dist_ft.checkpoint.ledger import write_segment
from dist_ft.checkpoint.manifest import FileEntry, LedgerEntry, Manifest, TensorInfo
from dist_ft.checkpoint.saves import Draft, Outcome, Save, done, problem_of
from dist_ft.checkpoint.writer import Writer
from dist_ft.config.schema import CheckpointSection
from dist_ft.engine.base import Engine
from dist_ft.errors import CheckpointError, DistFtError, StorageError
from dist_ft.storage import Store
from dist_ft.world import Collectives, World, on_rank0

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
        self._under_way: Save | None = None
        self._writer = Writer(world.rank, section.background_mb_s * 1e6)

    def newest(self) -> Manifest | None:
        """Return the newest checkpoint, the same on all ranks, of which manifest and lengths are right.

        None of its bytes is read: `load` checks them, and may have to go back further.
        """
        return self._go_on_from(catalogue.newest(self._store, self._world, self._collectives, self._require_whole))

    def _require_whole(self, manifest: Manifest) -> None:
        on_rank0(self._world, self._collectives, lambda: catalogue.require_whole(self._store, manifest))

    def _go_on_from(self, manifest: Manifest | None) -> Manifest | None:
        """Take a checkpoint for the end of the history that this attempt goes on with."""
        self._ledger = manifest.ledger if manifest else ()
        self._origin = manifest.progress.step if manifest else -1
        return manifest

    def load(self, manifest: Manifest, engine: Engine, tensors: dict[str, TensorInfo]) -> Manifest:
        """Fill the engine's slots from a checkpoint of any world, stage or engine; `tensors` are the model's.

        Each byte is read once and checked before it is used. Returns the checkpoint that was loaded: where `manifest`
        turns out to be damaged, on any rank, the newest sound one before it. Raises CheckpointError if there is none,
        or if it is another model's: flat offsets alone would fit a smaller one.
        """
        slots = list(engine.slots())
        wanted = [Wanted(i, slot.name, slot.key, slot.offset, slot.numel) for i, slot in enumerate(slots)]

        def fill(found: Manifest) -> None:
            where = catalogue.checkpoint_store(self._store, found).shown()
            manifests.require_same_tensors(found.tensors, tensors, where)
            reader = catalogue.shared_reader(self._store, found, self._world, self._collectives)
            for index, values in reader.read_many(wanted):
                slots[index].write(torch.from_numpy(values))

        name = manifests.folder_name(manifest.progress.step, manifest.attempt)
        loaded = self._go_on_from(catalogue.newest(self._store, self._world, self._collectives, fill, name))
        if loaded is None:
            raise CheckpointError(f"{self._store.shown(catalogue.FOLDER)}: {name} is gone, and there is none before it")
        engine.finish_load(loaded.progress.optimizer_step)
        return loaded

    def save(self, engine: Engine, draft: Draft) -> Outcome:
        """Commit a checkpoint before returning; a collective call. What is under way must be settled before."""
        return self._settle(self._begin(draft, done(lambda folder: self._writer.write(folder, list(engine.slots())))))

    def prepare(self, engine: Engine) -> None:
        """Make the memory that `begin` copies into."""
        self._writer.prepare(list(engine.slots()))

    def begin(self, engine: Engine, draft: Draft) -> None:
        """Copy the state and return; it is written while training goes on. What is under way must be settled before."""
        slots = list(engine.slots())
        self._begin(draft, lambda folder: self._writer.snapshot(folder, slots))

    def _begin(self, draft: Draft, write: Callable[[Store], Future[list[FileEntry]]]) -> Save:
        if self._under_way is not None:
            raise AssertionError("one save at a time")
        name = manifests.folder_name(draft.progress.step, self._attempt)
        self._under_way = save = Save(draft, name, write(self._store.child(f"{catalogue.FOLDER}/{name}")))
        return save

    @property
    def busy(self) -> bool:
        """Tell whether a save is under way; the same on all ranks."""
        return self._under_way is not None

    def flags(self) -> tuple[float, float]:
        """Return what this rank adds to the two sums `advance` takes: its files are written, the commit has ended."""
        save = self._under_way
        if save is None:
            return 0.0, 0.0
        return float(save.files.done()), float(save.commit is not None and save.commit.done())

    def advance(self, num_written: float, num_ended: float) -> Outcome | None:
        """Go on with the save under way, given the sums of all ranks' `flags`; a collective call.

        Waits for nothing but small messages. Returns how the save ended, once it has.
        """
        save = self._under_way
        if save is None:
            return None
        if not save.agreed:
            if num_written < self._world.size:
                return None
            return self._agree(save)
        return self._conclude(save) if num_ended else None

    def settle(self) -> Outcome | None:
        """Wait for the end of the save under way and return how it ended; a collective call."""
        return None if self._under_way is None else self._settle(self._under_way)

    def _settle(self, save: Save) -> Outcome:
        if not save.agreed:
            wait([save.files])
            outcome = self._agree(save)
            if outcome is not None:
                return outcome
        if save.commit is not None:
            wait([save.commit])
        return self._conclude(save)

    def close(self) -> None:
        """Leave what is not committed."""
        self._writer.close()

    def _agree(self, save: Save) -> Outcome | None:
        """All files are written, or some failed: tell all; rank 0 begins the commit, or clears away."""
        save.agreed = True
        problem = problem_of(save.files)
        first = next((error for error in self._collectives.all_gather(problem) if error is not None), None)
        gathered = self._collectives.gather((save.files.result() if problem is None else [], save.draft.rows)) or []
        if first is not None:
            if self._world.rank == 0:
                self._remove([save.name])  # on a full disk the next one needs the room
            return self._end(save, first)
        if self._world.rank == 0:
            files = tuple(item for part, _ in gathered for item in part)
            save.commit = self._writer.later(lambda: self._commit(save, files, [rows for _, rows in gathered]))
        return None

    def _conclude(self, save: Save) -> Outcome:
        """Tell all ranks how the commit went."""
        problem = problem_of(save.commit) if save.commit is not None else None
        return self._end(save, self._collectives.broadcast(problem))

    def _end(self, save: Save, problem: DistFtError | None) -> Outcome:
        self._under_way = None
        if problem is not None and not isinstance(problem, StorageError):
            raise problem
        return Outcome(save.draft, self._store.child(f"{catalogue.FOLDER}/{save.name}").url, problem)

    def _commit(self, save: Save, files: tuple[FileEntry, ...], rows: Sequence[np.ndarray]) -> None:
        """Check that the files are there, write ledger and manifest, prune (rank 0, in the background)."""
        draft, folder = save.draft, self._store.child(f"{catalogue.FOLDER}/{save.name}")
        try:
            ledger = self._extend_ledger(draft.progress.step, rows)
            self._seal(folder, Manifest(
                format_version=manifests.FORMAT_VERSION, run=draft.run, attempt=self._attempt,
                world_size=self._world.size, engine=draft.engine, progress=draft.progress, tensors=draft.tensors,
                aliases=draft.aliases, files=files, ledger=ledger, evaluation=draft.evaluation,
                created_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
                versions={name: version(name) for name in ("torch", "transformers", "safetensors")}))
            self._ledger = ledger
        except StorageError:
            self._remove([save.name])
            raise
        self._prune(save.name)

    def _extend_ledger(self, step: int, parts: Sequence[np.ndarray]) -> tuple[LedgerEntry, ...]:
        start = self._ledger[-1].stop if self._ledger else 0
        if step == start:
            return self._ledger
        return (*self._ledger, write_segment(self._store, start, step, self._attempt, parts))

    def _seal(self, folder: Store, manifest: Manifest) -> None:
        """Write the manifest, unless a newer attempt has started meanwhile."""
        failpoints.hit("checkpoint.before_manifest")
        newest = catalogue.newest_attempt(self._store)
        if newest > self._attempt:
            raise CheckpointError(f"{folder.shown()}: attempt {self._attempt} must not commit, attempt {newest} has "
                                  "taken over the run; this process ends")
        there = folder.sizes()
        for item in manifest.files:
            if there.get(item.path) != item.num_bytes:
                raise StorageError(f"{folder.shown(item.path)}: {there.get(item.path, 0)} bytes are there, "
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
