"""Saving and loading the checkpoints of one run.

Guarantees: a checkpoint exists when its manifest does, and the manifest is written last, by rank 0, after every file
was written and its length read back; a worker of an older attempt does not commit. In the background a save goes
through the same two steps: all ranks learn that all files are written, then rank 0 commits; that a rank is ready
travels with the sum each training step makes anyway (`flags`, `advance`).
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import version

import numpy as np
import torch

from dist_ft import failpoints
from dist_ft.checkpoint import catalogue, retention
from dist_ft.checkpoint import manifest as manifests
from dist_ft.checkpoint.fragments import FragmentReader, Wanted
from dist_ft.checkpoint.ledger import write_segment
from dist_ft.checkpoint.manifest import FileEntry, LedgerEntry, Manifest, TensorInfo
from dist_ft.checkpoint.node_tier import NodeTier
from dist_ft.checkpoint.saves import Draft, Outcome, Save, done, problem_of
from dist_ft.checkpoint.writer import Writer
from dist_ft.config.schema import CheckpointSection
from dist_ft.engine.base import Engine, Slot
from dist_ft.errors import CheckpointError, DistFtError, StorageError
from dist_ft.storage import Store
from dist_ft.world import Collectives, World, on_rank0

log = logging.getLogger("dist_ft.checkpoint")


class CheckpointManager:
    """The checkpoints of the run at `store`, for one worker of one attempt.

    Attributes:
        reached: step of the newest commit of this attempt, or of what it went on from; the same on all ranks.
    """

    def __init__(self, store: Store, section: CheckpointSection, world: World, collectives: Collectives,
                 attempt: int, nodes: NodeTier | None = None) -> None:
        """Assign only. `nodes`: what the workers' own nodes hold, if the config has checkpoints there."""
        self._store = store
        self._section = section
        self._world = world
        self._collectives = collectives
        self._attempt = attempt
        self._nodes = nodes
        self._ledger: tuple[LedgerEntry, ...] = ()
        self._shared: tuple[FileEntry, ...] = ()
        self._frozen: frozenset[str] = frozenset()
        self._loose: str | None = None
        self._origin: int | None = None
        self.reached = 0
        self._under_way: Save | None = None
        self._writer = Writer(world.rank, section.background_mb_s * 1e6)

    def newest(self) -> Manifest | None:
        """Return the newest checkpoint, the same on all ranks, of which manifest and lengths are right.

        None of its bytes is read: `load` checks them, and may have to go back further.
        """
        return self._go_on_from((self._nodes.newest() if self._nodes else None) or catalogue.newest(
            self._store, self._world, self._collectives, self._require_whole))

    def _require_whole(self, manifest: Manifest) -> None:
        on_rank0(self._world, self._collectives, lambda: catalogue.require_whole(self._store, manifest))

    def _go_on_from(self, manifest: Manifest | None) -> Manifest | None:
        """Take a checkpoint for the end of the history that this attempt goes on with."""
        self._ledger, self._loose = (manifest.ledger if manifest else ()), None
        self._origin = manifest.progress.step if manifest else -1
        self.reached = max(0, self._origin)
        self._shared = tuple(item for item in manifest.files if item.shared) if manifest else ()
        self._frozen = frozenset(manifest.frozen if manifest else ())
        if self._nodes is not None:
            keep = (manifests.folder_name(manifest.progress.step, manifest.attempt)
                    if manifest is not None and manifest.layout else "")
            if self._world.rank == 0:
                self._forget_on_nodes(keep)
            self._remove_on_nodes(self._nodes.others(keep))
        return manifest

    def _remove_on_nodes(self, names: list[str]) -> None:
        if self._nodes is not None and names:
            self._writer.later(partial(self._nodes.remove, names))

    def load(self, manifest: Manifest, engine: Engine, tensors: dict[str, TensorInfo]) -> Manifest:
        """Fill the engine's slots from a checkpoint of any world, stage or engine; `tensors` are the model's.

        Each byte is read once and checked before it is used. Returns the checkpoint that was loaded: where `manifest`
        turns out to be damaged, on any rank, the newest sound one before it. Raises CheckpointError if there is none,
        or if it is another model's: flat offsets alone would fit a smaller one.
        """
        slots = list(engine.slots())
        wanted = [Wanted(i, slot.name, slot.key, slot.offset, slot.numel) for i, slot in enumerate(slots)]

        def fill(found: Manifest, reader: FragmentReader) -> None:
            manifests.require_same_tensors(found.tensors, tensors, reader.shown())
            for index, values in reader.read_many(wanted):
                slots[index].write(torch.from_numpy(values))

        def from_storage(found: Manifest) -> None:
            self._require_whole(found)
            fill(found, catalogue.shared_reader(self._store, found, self._world, self._collectives))

        name = manifests.folder_name(manifest.progress.step, manifest.attempt)
        loaded = self._nodes.load(name, fill) if self._nodes is not None and manifest.layout else None
        if loaded is None:
            loaded = catalogue.newest(self._store, self._world, self._collectives, from_storage,
                                      "" if manifest.layout else name)
        if self._go_on_from(loaded) is None or loaded is None:
            raise CheckpointError(f"{self._store.shown()}: checkpoint {name} is gone, and there is none before it; the "
                                  "same command begins again")
        engine.finish_load(loaded.progress.optimizer_step)
        return loaded

    def save(self, engine: Engine, draft: Draft) -> Outcome:
        """Commit a checkpoint before returning; a collective call. What is under way must be settled before."""
        write = done(lambda folder: self._writer.write(folder, _changing(engine), draft.on_nodes))
        return self._settle(self._begin(engine, draft, write))

    def prepare(self, engine: Engine) -> None:
        """Make the memory that `begin` copies into."""
        self._writer.prepare(_changing(engine), self._nodes is not None)

    def begin(self, engine: Engine, draft: Draft) -> None:
        """Copy the state and return; it is written while training goes on. What is under way must be settled before."""
        slots = _changing(engine)
        self._begin(engine, draft, lambda folder: self._writer.snapshot(folder, slots, draft.on_nodes))

    def _begin(self, engine: Engine, draft: Draft, write: Callable[[Store], Future[list[FileEntry]]]) -> Save:
        if self._under_way is not None:
            raise AssertionError("one save at a time")
        name = manifests.folder_name(draft.progress.step, self._attempt)
        self._under_way = save = Save(draft, name, write(self._files(draft, name)), engine.frozen())
        if not save.frozen <= self._frozen:  # the same on all ranks
            slots = [slot for slot in engine.slots() if slot.key == "frozen"]
            shared = self._store.child(f"{catalogue.FROZEN}/{name}")
            save.shared = self._writer.later(lambda: self._writer.write(shared, slots))
        return save

    def _files(self, draft: Draft, name: str) -> Store:
        if not draft.on_nodes:
            return self._store.child(f"{catalogue.FOLDER}/{name}")
        if self._nodes is None:
            raise AssertionError("there is no folder on the nodes")
        return self._nodes.files(name)

    @property
    def under_way(self) -> Draft | None:
        """Return the draft of the save under way; the same on all ranks."""
        return self._under_way.draft if self._under_way else None

    def flags(self) -> tuple[float, float]:
        """Return what this rank adds to the two sums `advance` takes: its files are written, the commit has ended."""
        save = self._under_way
        if save is None:
            return 0.0, 0.0
        return float(save.is_written()), float(save.commit is not None and save.commit.done())

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
            save.wait()
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
        problem = save.problem()
        first = next((error for error in self._collectives.all_gather(problem) if error is not None), None)
        gathered = self._collectives.gather((self._entries(save) if problem is None else [], save.draft.rows)) or []
        if first is not None:
            self._clear_away(save)  # on a full disk the next one needs the room
            return self._end(save, first)
        if self._world.rank == 0:
            files = tuple(item for part, _ in gathered for item in part)
            if save.shared is None:
                files += self._shared
            save.commit = self._writer.later(lambda: self._commit(save, files, [rows for _, rows in gathered]))
        return None

    def _entries(self, save: Save) -> list[FileEntry]:
        """Return what the manifest will say of this worker's files."""
        shared = save.shared.result() if save.shared is not None else []
        return [*save.files.result(),
                *(item.model_copy(update={"path": f"{save.name}/{item.path}", "shared": True}) for item in shared)]

    def _conclude(self, save: Save) -> Outcome:
        """Tell all ranks how the commit went."""
        problem = self._collectives.broadcast(problem_of(save.commit) if save.commit is not None else None)
        if problem is not None:
            self._frozen = frozenset()  # perhaps it is their files that were lost: the next save writes them anew
        else:
            self.reached = save.draft.progress.step
            self._frozen = save.frozen if save.shared is not None else self._frozen
        if self._nodes is not None and problem is None:  # once it is in storage, it need not be on the nodes
            self._remove_on_nodes(self._nodes.others(save.name if save.draft.on_nodes else "", before=save.name))
        return self._end(save, problem)

    def _end(self, save: Save, problem: DistFtError | None) -> Outcome:
        self._under_way = None
        if problem is not None and not isinstance(problem, StorageError):
            raise problem
        return Outcome(save.draft, self._files(save.draft, save.name).url, problem)

    def _commit(self, save: Save, files: tuple[FileEntry, ...], rows: Sequence[np.ndarray]) -> None:
        """Check that the files are there, write ledger and manifest, prune (rank 0, in the background)."""
        draft, nodes = save.draft, self._nodes if save.draft.on_nodes else None
        folder = self._store.child(f"{catalogue.NODES if nodes else catalogue.FOLDER}/{save.name}")
        if draft.before is not None:
            wait([draft.before])
        try:
            ledger = self._extend_ledger(draft.progress.step, rows)
            self._seal(folder, Manifest(
                format_version=manifests.FORMAT_VERSION if save.frozen else 1, run=draft.run, attempt=self._attempt,
                world_size=self._world.size, engine=draft.engine, progress=draft.progress, tensors=draft.tensors,
                aliases=draft.aliases, files=files, ledger=ledger,
                frozen=tuple(sorted(save.frozen if save.shared is not None else self._frozen)),
                evaluation=draft.evaluation, layout=nodes.layout if nodes else "",
                created_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
                versions={name: version(name) for name in ("torch", "transformers", "safetensors")}))
        except StorageError:
            self._clear_away(save)
            raise
        self._shared = tuple(item for item in files if item.shared)
        if nodes is None:
            self._ledger = ledger
            retention.prune(self._store, self._section, self._attempt, self._origin, save.name)
        self._forget_on_nodes(save.name if nodes else "", ledger)
        self._loose = ledger[-1].file.path if nodes and ledger != self._ledger else None

    def _forget_on_nodes(self, keep: str, ledger: tuple[LedgerEntry, ...] = ()) -> None:
        """Remove other manifests of checkpoints on the nodes, and the segment that only they name, not `ledger`."""
        try:
            if self._nodes is not None:
                self._nodes.forget(keep)
            if self._loose is not None and self._loose not in [item.file.path for item in ledger]:
                self._store.remove(self._loose)
        except StorageError as error:
            log.warning("older checkpoints on the nodes were not removed: %s", error)

    def _extend_ledger(self, step: int, parts: Sequence[np.ndarray]) -> tuple[LedgerEntry, ...]:
        start = self._ledger[-1].stop if self._ledger else 0
        if step == start:
            return self._ledger
        return (*self._ledger, write_segment(self._store, start, step, self._attempt, parts))

    def _seal(self, folder: Store, manifest: Manifest) -> None:
        """Write the manifest, unless a newer attempt has started meanwhile."""
        failpoints.hit("checkpoint.before_manifest")
        self._require_current(folder)
        self._require_written(folder, manifest)
        folder.write(manifests.NAME, manifests.seal(manifest))
        try:
            self._require_current(folder)  # that write may have taken long
        except CheckpointError:
            folder.remove(manifests.NAME)
            raise
        failpoints.hit("checkpoint.after_manifest")

    def _require_written(self, folder: Store, manifest: Manifest) -> None:
        """Raise StorageError if a file that can be seen from here is not as long as what was written."""
        own = folder.sizes() if not manifest.layout else {}
        shared = self._store.child(catalogue.FROZEN).sizes() if manifest.frozen else {}
        for item in manifest.files:
            if manifest.layout and not item.shared:
                continue  # on its worker's node
            where, found = (self._store.child(catalogue.FROZEN), shared) if item.shared else (folder, own)
            if found.get(item.path) != item.num_bytes:
                raise StorageError(f"{where.shown(item.path)}: {found.get(item.path, 0)} bytes are there, "
                                   f"{item.num_bytes} were written; the storage lost some; checkpoint not committed")

    def _require_current(self, folder: Store) -> None:
        newest = catalogue.newest_attempt(self._store)
        if newest > self._attempt:
            raise CheckpointError(f"{folder.shown()}: attempt {self._attempt} must not commit, attempt {newest} has "
                                  "taken over the run; this process ends")

    def _clear_away(self, save: Save) -> None:
        """Remove what was written of a save that failed (of one on the nodes, this node's)."""
        if self._nodes is not None and save.draft.on_nodes:
            with contextlib.suppress(StorageError):
                self._nodes.files(save.name).remove("")
        elif self._world.rank == 0:
            retention.remove(self._store, [save.name])
        if self._world.rank == 0 and save.shared is not None:
            with contextlib.suppress(StorageError):
                self._store.remove(f"{catalogue.FROZEN}/{save.name}")


def _changing(engine: Engine) -> list[Slot]:
    """Return the state that every checkpoint holds anew."""
    return [slot for slot in engine.slots() if slot.key != "frozen"]
