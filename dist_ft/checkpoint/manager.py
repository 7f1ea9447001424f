"""Saves and loads the checkpoints of one run.

A checkpoint exists if its manifest exists. The manifest is written last, by rank 0, after every
file was written and its length was checked. A worker of an older attempt does not commit.

A save in the background goes through the same two steps: all ranks learn that all files are
written, then rank 0 commits. Whether a rank is ready travels with the sum that each training step
computes anyway (`save_flags`, `advance`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from concurrent.futures import Future, wait
from functools import partial

import torch

from dist_ft.checkpoint import discovery, retention
from dist_ft.checkpoint import manifest as manifests
from dist_ft.checkpoint.commit import Committer, WorkerPart, WrittenFiles
from dist_ft.checkpoint.fragments import FragmentReader, FragmentRequest
from dist_ft.checkpoint.local_tier import LocalTier
from dist_ft.checkpoint.manifest import FileEntry, Manifest, TensorInfo
from dist_ft.checkpoint.save_status import (
    LostSharedError,
    SaveFlags,
    SaveInProgress,
    SaveOutcome,
    SaveRequest,
    failure_of,
    run_synchronously,
)
from dist_ft.checkpoint.tier import Tier
from dist_ft.checkpoint.writer import Writer, trained_state
from dist_ft.config.schema import CheckpointSection
from dist_ft.core.errors import CheckpointError, DistFtError, StorageError
from dist_ft.core.world import Collectives, World, on_rank0
from dist_ft.engine.base import Engine
from dist_ft.storage.filesystem import Store


class CheckpointManager:
    """The checkpoints of the run at `store`, for one worker of one attempt.

    Attributes:
        latest_step: step of the latest checkpoint of this attempt, or of the one it resumed from;
            the same on all ranks.
    """

    def __init__(
        self,
        store: Store,
        section: CheckpointSection,
        world: World,
        collectives: Collectives,
        attempt: int,
        local: LocalTier | None = None,
    ) -> None:
        """Store the arguments; nothing is read or written.

        Args:
            store: the run's folder.
            section: the checkpoint settings.
            world: this process among its peers.
            collectives: the control channel.
            attempt: number of the current attempt.
            local: the local checkpoints, if the config enables them.
        """
        self._store = store
        self._world = world
        self._collectives = collectives
        self._attempt = attempt
        self._local = local
        self._committer = Committer(store, section, world.num_ranks, attempt, local)
        # Names of the weights whose shared files are in storage.
        self._frozen: frozenset[str] = frozenset()
        self.latest_step = 0
        self._save: SaveInProgress | None = None
        self._writer = Writer(world.rank, section.background_mb_s * 1e6)

    def find_latest(self) -> Manifest | None:
        """Return the latest checkpoint with a valid manifest and complete files; same on all ranks.

        No file is read: `load` verifies the content, and may have to load an earlier checkpoint.
        """
        # Local first: candidates older than the latest checkpoint in storage are left out there.
        latest = self._local.find_latest() if self._local else None
        if latest is None:
            latest = discovery.find_latest(
                self._store, self._world, self._collectives, self._require_complete
            )

        on_rank0(self._world, self._collectives, lambda: self._committer.start(latest is None))
        self._continue_from(latest)
        return latest

    def _require_complete(self, manifest: Manifest) -> None:
        # By one rank for all: each listing is a request to the storage.
        on_rank0(
            self._world,
            self._collectives,
            lambda: discovery.require_complete(self._store, manifest),
        )

    def _continue_from(self, manifest: Manifest | None) -> None:
        """Continue the history that ends with a checkpoint; with None, start from nothing."""
        self._committer.continue_from(manifest)
        self.latest_step = 0
        self._frozen = frozenset()
        if manifest is not None:
            self.latest_step = manifest.progress.step
            self._frozen = frozenset(manifest.frozen)

        # Skipped local checkpoints must go: what is saved from here on is another history.
        if self._local is not None:
            keep = ""
            if manifest is not None and manifest.layout:
                keep = manifest.folder_name
            if self._world.rank == 0:
                self._committer.remove_local_checkpoints(keep)
            self._remove_local_files(self._local.list_removable(keep))

    def _remove_local_files(self, names: list[str]) -> None:
        # In the background, since removing gigabytes takes time and nothing waits for it.
        if self._local is not None and names:
            self._writer.submit(partial(self._local.remove, names))

    def load(self, manifest: Manifest, engine: Engine, tensors: dict[str, TensorInfo]) -> Manifest:
        """Load the engine's state from a checkpoint of any world, stage or engine.

        Each byte is read once and verified before it is used. If the checkpoint is damaged, on any
        rank, the latest undamaged one before it is loaded.

        Args:
            manifest: the checkpoint, from `find_latest`.
            engine: its state is overwritten.
            tensors: full shapes of the model's weights.

        Returns:
            The checkpoint that was loaded.

        Raises:
            CheckpointError: no checkpoint is undamaged, or it is one of another model (flat offsets
                alone would fit a smaller model).
        """
        state = list(engine.state_slices())
        requests = [
            FragmentRequest(i, part.name, part.key, part.offset, part.numel)
            for i, part in enumerate(state)
        ]

        # Damage may show half-way. The next checkpoint that is tried overwrites all state.
        def load_weights(found: Manifest, reader: FragmentReader) -> None:
            manifests.require_same_tensors(found.tensors, tensors, reader.redacted_url())
            for index, values in reader.read_many(requests):
                state[index].write(torch.from_numpy(values))

        def load_from_storage(found: Manifest) -> None:
            self._require_complete(found)
            reader = discovery.open_reader_together(
                self._store, found, self._world, self._collectives
            )
            load_weights(found, reader)

        name = manifest.folder_name
        is_local = bool(manifest.layout)
        loaded = None
        if self._local is not None and is_local:
            loaded = self._local.load(name, load_weights)

        # Never a later checkpoint than the given one. A local one is later than all in storage.
        if loaded is None:
            upto = "" if is_local else name
            loaded = discovery.find_latest(
                self._store, self._world, self._collectives, load_from_storage, upto=upto
            )

        # Again: the checkpoint may be an earlier one than `find_latest` returned.
        self._continue_from(loaded)
        if loaded is None:
            raise CheckpointError(
                f"{self._store.redacted_url()}: checkpoint {name} was removed, and no earlier one "
                "exists. Run the same command again to start from step 0."
            )
        engine.finish_load(loaded.progress.optimizer_step)
        return loaded

    def save(self, engine: Engine, request: SaveRequest) -> SaveOutcome:
        """Save and commit a checkpoint before returning.

        A collective call; no other save may be in progress.
        """
        write = run_synchronously(
            lambda folder: self._writer.write(
                folder, trained_state(engine), request.tier is Tier.LOCAL
            )
        )
        return self._finish(self._start(engine, request, write))

    def remember_stored_files(self) -> None:
        """Copy what the run stores next to its checkpoints, to restore it should it get lost."""
        if self._world.rank == 0:
            self._writer.submit(self._committer.stored_files.remember)

    def require_folder(self) -> None:
        """Raise CheckpointError if the run's folder was removed meanwhile. A collective call."""
        on_rank0(self._world, self._collectives, self._committer.require_folder)

    def prepare(self, engine: Engine) -> None:
        """Allocate the memory that `start_save` copies into."""
        self._writer.prepare(trained_state(engine), self._local is not None)

    def start_save(self, engine: Engine, request: SaveRequest) -> None:
        """Copy the state and return.

        The copy is written in the background. No other save may be in progress.
        """
        state = trained_state(engine)
        is_local = request.tier is Tier.LOCAL
        self._start(engine, request, lambda folder: self._writer.snapshot(folder, state, is_local))

    def _start(
        self,
        engine: Engine,
        request: SaveRequest,
        write: Callable[[Store], Future[list[FileEntry]]],
    ) -> SaveInProgress:
        if self._save is not None:
            raise AssertionError("another save is in progress")

        name = manifests.folder_name(request.progress.step, self._attempt)
        files = write(self._checkpoint_folder(request, name))
        self._save = save = SaveInProgress(request, name, files, engine.frozen_parameters())

        # Frozen weights are written once and shared by all later checkpoints. All ranks decide
        # alike, since both sets are the same on all of them.
        writes_frozen_weights = not save.frozen <= self._frozen
        if writes_frozen_weights:
            state = [part for part in engine.state_slices() if part.key == "frozen"]
            shared_folder = self._store.child(f"{discovery.FROZEN}/{name}")
            save.shared = self._writer.submit(
                lambda: self._writer.write(shared_folder, state, in_background=True)
            )
        return save

    def _checkpoint_folder(self, request: SaveRequest, name: str) -> Store:
        if request.tier is Tier.STORAGE:
            return self._store.child(f"{discovery.FOLDER}/{name}")
        if self._local is None:
            raise AssertionError("local checkpoints are not enabled")
        return self._local.checkpoint_folder(name)

    @property
    def save_in_progress(self) -> SaveRequest | None:
        """The request of the save in progress; the same on all ranks."""
        return self._save.request if self._save else None

    def save_flags(self) -> SaveFlags:
        """Return what this rank adds to the sums that `advance` takes."""
        save = self._save
        if save is None:
            return SaveFlags(0.0, 0.0)

        commit_ended = save.commit is not None and save.commit.done()
        return SaveFlags(float(save.is_written()), float(commit_ended))

    def advance(self, num_written: float, num_ended: float) -> SaveOutcome | None:
        """Advance the save in progress; waits for small messages only. A collective call.

        Args:
            num_written: sum of `SaveFlags.files_written` over all ranks.
            num_ended: sum of `SaveFlags.commit_ended` over all ranks.

        Returns:
            How the save ended; None if it has not.
        """
        save = self._save
        if save is None:
            return None

        # Decided by sums, which are the same on all ranks: all enter the same collective call.
        if not save.agreed:
            if num_written < self._world.num_ranks:
                return None
            return self._exchange_results(save)
        return self._conclude(save) if num_ended else None

    def finish_save(self) -> SaveOutcome | None:
        """Wait for the save in progress and return how it ended. A collective call."""
        return None if self._save is None else self._finish(self._save)

    def _finish(self, save: SaveInProgress) -> SaveOutcome:
        if not save.agreed:
            save.wait()
            outcome = self._exchange_results(save)
            if outcome is not None:
                return outcome

        # Only rank 0 has a commit; the others wait for it in the broadcast of `_conclude`.
        if save.commit is not None:
            wait([save.commit])
        return self._conclude(save)

    def close(self) -> None:
        """Abandon what is not committed."""
        self._writer.close()

    def _exchange_results(self, save: SaveInProgress) -> SaveOutcome | None:
        """Exchange the results of writing.

        Then rank 0 starts the commit, or the files are removed if a rank failed.
        """
        save.agreed, own_problem = True, save.problem()
        problems = self._collectives.all_gather(own_problem)
        problem = next((error for error in problems if error is not None), None)

        # All ranks take part in this call, also if the save has failed on some of them.
        entries = self._list_entries(save) if own_problem is None else []
        part = WorkerPart(entries, save.request.rows, save.request.cursors)
        parts = self._collectives.gather(part) or []
        if problem is not None:
            # If the disk is full, the next save needs the space.
            self._remove_files(save)
            return self._end(save, problem)

        if self._world.rank == 0:
            written = WrittenFiles.combine(parts, self._frozen_after(save))
            save.commit = self._writer.submit(lambda: self._commit(save, written))
        return None

    def _list_entries(self, save: SaveInProgress) -> list[FileEntry]:
        """Return the manifest's entries of this worker's files."""
        entries = list(save.files.result())
        if save.shared is None:
            return entries

        # The path is relative to the folder of all shared files, as later checkpoints need it.
        for item in save.shared.result():
            path = f"{save.name}/{item.path}"
            entries.append(item.model_copy(update={"path": path, "shared": True}))
        return entries

    def _frozen_after(self, save: SaveInProgress) -> frozenset[str]:
        """Return the names of the weights in shared files once `save` is committed."""
        return self._frozen if save.shared is None else save.frozen

    def _conclude(self, save: SaveInProgress) -> SaveOutcome:
        """Send the result of the commit to all ranks and end the save."""
        own_problem = failure_of(save.commit) if save.commit is not None else None
        problem = self._collectives.broadcast(own_problem)
        if isinstance(problem, LostSharedError):
            self._frozen = frozenset()
        elif problem is None:
            self.latest_step = save.request.progress.step
            self._frozen = self._frozen_after(save)

        if self._local is not None and problem is None:
            # Earlier local files are no longer needed; nor are those of this step, once it is in
            # storage.
            keep = save.name if save.request.tier is Tier.LOCAL else ""
            self._remove_local_files(self._local.list_removable(keep, upto=save.name))
        return self._end(save, problem)

    def _end(self, save: SaveInProgress, problem: DistFtError | None) -> SaveOutcome:
        self._save = None

        # Failing storage only costs this checkpoint. Any other error ends the run.
        if problem is not None and not isinstance(problem, StorageError):
            raise problem

        url = self._checkpoint_folder(save.request, save.name).url
        return SaveOutcome(save.request, url, problem)

    def _commit(self, save: SaveInProgress, written: WrittenFiles) -> None:
        try:
            self._committer.commit(save, written)
        except StorageError:
            # Not after other errors: if a newer attempt has taken over, nothing is touched.
            self._remove_files(save)
            raise

    def _remove_files(self, save: SaveInProgress) -> None:
        """Remove the files of a failed save (of a local checkpoint, those on this node)."""
        tier = save.request.tier
        if self._local is not None and tier is Tier.LOCAL:
            with contextlib.suppress(StorageError):
                self._local.checkpoint_folder(save.name).remove("")

        if self._world.rank == 0:
            are_removed = retention.remove_checkpoints(self._store, [save.name], tier)
            # If the manifest could not be removed, the shared files that it names must stay.
            if are_removed and save.shared is not None:
                with contextlib.suppress(StorageError):
                    self._store.remove(f"{discovery.FROZEN}/{save.name}")
