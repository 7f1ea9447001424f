"""Saving and loading the checkpoints of one run.

Guarantees: a checkpoint exists when its manifest does, and the manifest is written last, by rank 0, after every file
was written and its length read back; a worker of an older attempt does not commit. In the background a save goes
through the same two steps: all ranks learn that all files are written, then rank 0 commits; that a rank is ready
travels with the sum each training step makes anyway (`flags`, `advance`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from functools import partial

import numpy as np
import torch

from dist_ft.checkpoint import discovery, retention
from dist_ft.checkpoint import manifest as manifests
from dist_ft.checkpoint.commit import Committer
from dist_ft.checkpoint.fragments import FragmentReader, FragmentRequest
from dist_ft.checkpoint.local_tier import LocalTier
from dist_ft.checkpoint.manifest import FileEntry, Manifest, TensorInfo
from dist_ft.checkpoint.save_status import SaveRequest, LostSharedError, SaveOutcome, SaveInProgress, run_synchronously, failure_of
from dist_ft.checkpoint.writer import Writer
from dist_ft.config.schema import CheckpointSection
from dist_ft.core.errors import CheckpointError, DistFtError, StorageError
from dist_ft.core.world import Collectives, World, on_rank0
from dist_ft.engine.base import Engine, StateSlice
from dist_ft.storage.filesystem import Store


class CheckpointManager:
    """The checkpoints of the run at `store`, for one worker of one attempt.

    Attributes:
        reached: step of the newest commit of this attempt, or of what it went on from; the same on all ranks.
    """

    def __init__(
        self,
        store: Store,
        section: CheckpointSection,
        world: World,
        collectives: Collectives,
        attempt: int,
        nodes: LocalTier | None = None,
    ) -> None:
        """Assign only. `nodes`: what the workers' own nodes hold, if the config has checkpoints there."""
        self._store = store
        self._world = world
        self._collectives = collectives
        self._attempt = attempt
        self._nodes = nodes
        self._commits = Committer(store, section, world.num_ranks, attempt, nodes)
        self._frozen: frozenset[str] = frozenset()
        self.reached = 0
        self._under_way: SaveInProgress | None = None
        self._writer = Writer(world.rank, section.background_mb_s * 1e6)

    def newest(self) -> Manifest | None:
        """Return the newest checkpoint, the same on all ranks, of which manifest and lengths are right.

        None of its bytes is read: `load` checks them, and may have to go back further.
        """
        return self._go_on_from(
            (self._nodes.newest() if self._nodes else None)
            or discovery.find_latest(self._store, self._world, self._collectives, self._require_whole)
        )

    def _require_whole(self, manifest: Manifest) -> None:
        on_rank0(
            self._world, self._collectives, lambda: discovery.require_complete(self._store, manifest)
        )

    def _go_on_from(self, manifest: Manifest | None) -> Manifest | None:
        """Take a checkpoint for the end of the history that this attempt goes on with."""
        self._commits.go_on_from(manifest)
        self.reached = manifest.progress.step if manifest else 0
        self._frozen = frozenset(manifest.frozen if manifest else ())
        if self._nodes is not None:
            keep = (
                manifests.folder_name(manifest.progress.step, manifest.attempt)
                if manifest is not None and manifest.layout
                else ""
            )
            if self._world.rank == 0:
                self._commits.forget_on_nodes(keep)
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
        slots = list(engine.state_slices())
        wanted = [
            FragmentRequest(i, slot.name, slot.key, slot.offset, slot.numel) for i, slot in enumerate(slots)
        ]

        def fill(found: Manifest, reader: FragmentReader) -> None:
            manifests.require_same_tensors(found.tensors, tensors, reader.shown())
            for index, values in reader.read_many(wanted):
                slots[index].write(torch.from_numpy(values))

        def from_storage(found: Manifest) -> None:
            self._require_whole(found)
            fill(found, discovery.open_reader_together(self._store, found, self._world, self._collectives))

        name = manifests.folder_name(manifest.progress.step, manifest.attempt)
        loaded = (
            self._nodes.load(name, fill) if self._nodes is not None and manifest.layout else None
        )
        if loaded is None:
            loaded = discovery.find_latest(
                self._store,
                self._world,
                self._collectives,
                from_storage,
                "" if manifest.layout else name,
            )
        if self._go_on_from(loaded) is None or loaded is None:
            raise CheckpointError(
                f"{self._store.shown()}: checkpoint {name} is gone, and there is none before it; the "
                "same command begins again"
            )
        engine.finish_load(loaded.progress.optimizer_step)
        return loaded

    def save(self, engine: Engine, draft: SaveRequest) -> SaveOutcome:
        """Commit a checkpoint before returning; a collective call. What is under way must be settled before."""
        write = run_synchronously(lambda folder: self._writer.write(folder, _changing(engine), draft.on_nodes))
        return self._settle(self._begin(engine, draft, write))

    def prepare(self, engine: Engine) -> None:
        """Make the memory that `begin` copies into."""
        self._writer.prepare(_changing(engine), self._nodes is not None)

    def begin(self, engine: Engine, draft: SaveRequest) -> None:
        """Copy the state and return; it is written while training goes on. What is under way must be settled before."""
        slots = _changing(engine)
        self._begin(
            engine, draft, lambda folder: self._writer.snapshot(folder, slots, draft.on_nodes)
        )

    def _begin(
        self, engine: Engine, draft: SaveRequest, write: Callable[[Store], Future[list[FileEntry]]]
    ) -> SaveInProgress:
        if self._under_way is not None:
            raise AssertionError("one save at a time")
        name = manifests.folder_name(draft.progress.step, self._attempt)
        self._under_way = save = SaveInProgress(draft, name, write(self._files(draft, name)), engine.frozen())
        if not save.frozen <= self._frozen:  # the same on all ranks
            slots = [slot for slot in engine.state_slices() if slot.key == "frozen"]
            shared = self._store.child(f"{discovery.FROZEN}/{name}")
            save.shared = self._writer.later(
                lambda: self._writer.write(shared, slots, in_background=True)
            )
        return save

    def _files(self, draft: SaveRequest, name: str) -> Store:
        if not draft.on_nodes:
            return self._store.child(f"{discovery.FOLDER}/{name}")
        if self._nodes is None:
            raise AssertionError("there is no folder on the nodes")
        return self._nodes.files(name)

    @property
    def under_way(self) -> SaveRequest | None:
        """Return the draft of the save under way; the same on all ranks."""
        return self._under_way.draft if self._under_way else None

    def flags(self) -> tuple[float, float]:
        """Return what this rank adds to the two sums `advance` takes: its files are written, the commit has ended."""
        save = self._under_way
        if save is None:
            return 0.0, 0.0
        return float(save.is_written()), float(save.commit is not None and save.commit.done())

    def advance(self, num_written: float, num_ended: float) -> SaveOutcome | None:
        """Go on with the save under way, given the sums of all ranks' `flags`; a collective call.

        Waits for nothing but small messages. Returns how the save ended, once it has.
        """
        save = self._under_way
        if save is None:
            return None
        if not save.agreed:
            if num_written < self._world.num_ranks:
                return None
            return self._agree(save)
        return self._conclude(save) if num_ended else None

    def settle(self) -> SaveOutcome | None:
        """Wait for the end of the save under way and return how it ended; a collective call."""
        return None if self._under_way is None else self._settle(self._under_way)

    def _settle(self, save: SaveInProgress) -> SaveOutcome:
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

    def _agree(self, save: SaveInProgress) -> SaveOutcome | None:
        """All files are written, or some failed: tell all; rank 0 begins the commit, or clears away."""
        save.agreed = True
        problem = save.problem()
        first = next(
            (error for error in self._collectives.all_gather(problem) if error is not None), None
        )
        gathered = (
            self._collectives.gather(
                (self._entries(save) if problem is None else [], save.draft.rows)
            )
            or []
        )
        if first is not None:
            self._clear_away(save)  # on a full disk the next one needs the room
            return self._end(save, first)
        if self._world.rank == 0:
            files = tuple(item for part, _ in gathered for item in part)
            rows, frozen = [part for _, part in gathered], self._frozen_after(save)
            save.commit = self._writer.later(lambda: self._commit(save, files, frozen, rows))
        return None

    def _entries(self, save: SaveInProgress) -> list[FileEntry]:
        """Return what the manifest will say of this worker's files."""
        shared = save.shared.result() if save.shared is not None else []
        return [
            *save.files.result(),
            *(
                item.model_copy(update={"path": f"{save.name}/{item.path}", "shared": True})
                for item in shared
            ),
        ]

    def _frozen_after(self, save: SaveInProgress) -> frozenset[str]:
        """Return the names of the weights in shared files once `save` is committed."""
        return self._frozen if save.shared is None else save.frozen

    def _conclude(self, save: SaveInProgress) -> SaveOutcome:
        """Tell all ranks how the commit went."""
        problem = self._collectives.broadcast(
            failure_of(save.commit) if save.commit is not None else None
        )
        if isinstance(problem, LostSharedError):
            self._frozen = frozenset()
        elif problem is None:
            self.reached = save.draft.progress.step
            self._frozen = self._frozen_after(save)
        if (
            self._nodes is not None and problem is None
        ):  # once it is in storage, it need not be on the nodes
            self._remove_on_nodes(
                self._nodes.others(save.name if save.draft.on_nodes else "", before=save.name)
            )
        return self._end(save, problem)

    def _end(self, save: SaveInProgress, problem: DistFtError | None) -> SaveOutcome:
        self._under_way = None
        if problem is not None and not isinstance(problem, StorageError):
            raise problem
        return SaveOutcome(save.draft, self._files(save.draft, save.name).url, problem)

    def _commit(
        self,
        save: SaveInProgress,
        files: tuple[FileEntry, ...],
        frozen: frozenset[str],
        rows: Sequence[np.ndarray],
    ) -> None:
        try:
            self._commits.commit(save, files, frozen, rows)
        except StorageError:
            self._clear_away(save)
            raise

    def _clear_away(self, save: SaveInProgress) -> None:
        """Remove what was written of a save that failed (of one on the nodes, this node's)."""
        on_nodes = self._nodes is not None and save.draft.on_nodes
        if self._nodes is not None and on_nodes:
            with contextlib.suppress(StorageError):
                self._nodes.files(save.name).remove("")
        if self._world.rank == 0:
            gone = retention.remove_checkpoints(
                self._store, [save.name], discovery.LOCAL_FOLDER if on_nodes else discovery.FOLDER
            )
            if (
                gone and save.shared is not None
            ):  # while a manifest may be there, what it names stays
                with contextlib.suppress(StorageError):
                    self._store.remove(f"{discovery.FROZEN}/{save.name}")


def _changing(engine: Engine) -> list[StateSlice]:
    """Return the state that every checkpoint holds anew."""
    return [slot for slot in engine.state_slices() if slot.key != "frozen"]
