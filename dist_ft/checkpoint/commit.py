"""Commits a save whose files are all written: ledger, manifest, retention.

This runs on rank 0, in the background.

The manifest is written last, after the length of every file was compared with what was written. A
worker of an older attempt does not commit, and removes its manifest if a newer attempt started
while it was written.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import wait
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from typing import NamedTuple

import numpy as np

from dist_ft.checkpoint import discovery, retention
from dist_ft.checkpoint import manifest as manifests
from dist_ft.checkpoint.attempts import LEDGER, Fence
from dist_ft.checkpoint.ledger import LedgerRows, write_segment
from dist_ft.checkpoint.local_tier import LocalTier
from dist_ft.checkpoint.manifest import FileEntry, LedgerEntry, Manifest
from dist_ft.checkpoint.save_status import LostSharedError, SaveInProgress
from dist_ft.checkpoint.stored_files import StoredFiles
from dist_ft.checkpoint.tier import Tier
from dist_ft.config.schema import CheckpointSection
from dist_ft.core import fault_injection
from dist_ft.core.errors import CheckpointError, StorageError
from dist_ft.storage.filesystem import Store

log = logging.getLogger("dist_ft.checkpoint")
RECORDED_PACKAGES = ("torch", "transformers", "safetensors", "deepspeed", "ray", "peft")


class WorkerPart(NamedTuple):
    """What one worker has written for a save.

    Attributes:
        files: entries of its files.
        ledger_rows: its ledger rows.
        cursors: int64 (n, 6) where its lanes are in streamed data; none if it is indexed.
    """

    files: Sequence[FileEntry]
    ledger_rows: LedgerRows
    cursors: np.ndarray


@dataclass(frozen=True)
class WrittenFiles:
    """What all workers have written for one save.

    Attributes:
        files: entries of all files. If none of them is shared, the shared files of the checkpoint
            before are reused.
        frozen: names of the weights in shared files.
        ledger_rows: ledger rows of each worker.
        cursors: int64 (n, 6) where all lanes are in streamed data; none if it is indexed.
    """

    files: tuple[FileEntry, ...]
    frozen: frozenset[str]
    ledger_rows: Sequence[LedgerRows]
    cursors: np.ndarray

    @classmethod
    def combine(cls, parts: Sequence[WorkerPart], frozen: frozenset[str]) -> WrittenFiles:
        """Return the parts of all workers as one; `frozen`: names of shared weights."""
        return cls(
            files=tuple(entry for part in parts for entry in part.files),
            frozen=frozen,
            ledger_rows=[part.ledger_rows for part in parts],
            cursors=np.concatenate([part.cursors for part in parts]),
        )


def _format_version(written: WrittenFiles) -> int:
    """Return the lowest version of a manifest that older releases need to know to read it."""
    if len(written.cursors):
        return 3
    return 2 if written.frozen else 1


class Committer:
    """Commits the checkpoints of one attempt at the run at `store`, by `num_workers` workers.

    Attributes:
        stored_files: what the run stores next to its checkpoints.
    """

    def __init__(
        self,
        store: Store,
        section: CheckpointSection,
        num_workers: int,
        attempt: int,
        local: LocalTier | None,
    ) -> None:
        """Store the arguments; nothing is read or written."""
        self._store = store
        self._section = section
        self._num_workers = num_workers
        self._attempt = attempt
        self._local = local
        self._fence = Fence(store, attempt)
        self.stored_files = StoredFiles(store)
        self._ledger: tuple[LedgerEntry, ...] = ()
        self._shared: tuple[FileEntry, ...] = ()
        # A ledger segment that only a local checkpoint names.
        self._local_only_segment: str | None = None
        self._start_step: int | None = None
        # Name of the last checkpoint that this attempt committed in storage.
        self._latest = ""
        self._warned_of_ledger = False

    def start(self, is_new: bool) -> None:
        """Get to know the run; `is_new`: no checkpoint of it was found.

        Raises:
            CheckpointError: it had checkpoints, and must not start over by itself.
        """
        self._fence.remember_record()

        # Local checkpoints may all be lost with their nodes, which is no reason to stop.
        if is_new and self._local is None:
            discovery.require_not_emptied(self._store)

    def require_folder(self) -> None:
        """Raise CheckpointError if what this attempt stored was removed meanwhile."""
        try:
            self._fence.require_folder()
            latest = f"{Tier.STORAGE.value}/{self._latest}"
            if self._latest and not self._store.exists(f"{latest}/{manifests.NAME}"):
                raise CheckpointError(
                    f"{self._store.redacted_url(latest)}: the checkpoint was committed and has "
                    "been removed since, not by this run. Restore it from a copy, or run the same "
                    "command again to repeat the steps since the checkpoint before."
                )
        except StorageError as error:
            log.warning("whether the run's folder is whole cannot be checked: %s", error)

    def continue_from(self, manifest: Manifest | None) -> None:
        """Use a checkpoint as the end of the history that this attempt continues.

        None to start from nothing.
        """
        self._local_only_segment = None
        if manifest is None:
            self._ledger = ()
            self._shared = ()
            # Every checkpoint is later than this, so those of older attempts are superseded.
            self._start_step = -1
            return

        self._ledger = manifest.ledger
        self._shared = tuple(item for item in manifest.files if item.shared)
        self._start_step = manifest.progress.step

    def commit(self, save: SaveInProgress, written: WrittenFiles) -> None:
        """Write ledger and manifest, after a check of the files; remove checkpoints not retained.

        Args:
            save: a save all of whose files are written.
            written: what all workers have written for it.
        """
        request = save.request
        local = self._local if request.tier is Tier.LOCAL else None
        tier = Tier.STORAGE if local is None else Tier.LOCAL

        folder = self._store.child(f"{tier.value}/{save.name}")
        self._prepare(save, folder)

        files = written.files
        if save.shared is None:
            files += self._shared

        # The ledger is written before the manifest that names its segments.
        ledger = self._extend_ledger(request.progress.step, written.ledger_rows)
        manifest = Manifest(
            format_version=_format_version(written),
            run=request.run,
            attempt=self._attempt,
            world_size=self._num_workers,
            engine=request.engine,
            progress=request.progress,
            tensors=request.tensors,
            aliases=request.aliases,
            files=files,
            ledger=ledger,
            frozen=tuple(sorted(written.frozen)),
            evaluation=request.evaluation,
            cursors=manifests.pack_cursors(written.cursors),
            layout="" if local is None else local.layout,
            created_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            versions={name: version(name) for name in RECORDED_PACKAGES},
        )
        self._write_manifest(folder, manifest)

        self._shared = tuple(item for item in files if item.shared)

        # Older checkpoints are removed only now that the manifest exists. A crash before it must
        # leave something to resume from.
        if local is None:
            self._ledger = ledger
            self._latest = save.name
            retention.remove_unretained(
                self._store, self._section, self._attempt, self._start_step, save.name
            )

        # A later checkpoint, of any tier, makes the earlier local ones useless.
        self.remove_local_checkpoints("" if local is None else save.name, ledger)

        # A local checkpoint leaves `self._ledger` at the last checkpoint in storage: the next one
        # there writes all rows since then as one segment, and this one is no longer needed.
        self._local_only_segment = None
        if local is not None and ledger != self._ledger:
            self._local_only_segment = ledger[-1].file.path

    def _prepare(self, save: SaveInProgress, folder: Store) -> None:
        """Wait for what is stored before a checkpoint, and check that it may be committed."""
        # `wait` raises no error of the task, which logs its own: metrics that cannot be written do
        # not cost the checkpoint.
        if save.request.commit_after is not None:
            wait([save.request.commit_after])

        # Before anything is written: an attempt that was replaced, or whose run was removed, must
        # not leave a segment that looks like one of a committed history.
        self._fence.require_current(folder.redacted_url())
        self.stored_files.restore()

    def remove_local_checkpoints(self, keep: str, ledger: tuple[LedgerEntry, ...] = ()) -> None:
        """Remove the manifests of local checkpoints except `keep`.

        The ledger segment that only local checkpoints name is removed too, unless in `ledger`.
        """
        try:
            if self._local is not None:
                self._local.remove_manifests(keep)

            # After the manifests, so that none of them names a segment that is gone.
            segments = [item.file.path for item in ledger]
            if self._local_only_segment is not None and self._local_only_segment not in segments:
                self._store.remove(self._local_only_segment)
        except StorageError as error:
            log.warning("older local checkpoints were not removed: %s", error)

    def _extend_ledger(
        self, step: int, rows_by_worker: Sequence[LedgerRows]
    ) -> tuple[LedgerEntry, ...]:
        start = 0
        if self._ledger:
            start = self._ledger[-1].stop

        self._warn_of_lost_segments()

        # No step since the last checkpoint in storage, so there are no rows either.
        if step == start:
            return self._ledger

        segment = write_segment(self._store, start, step, self._attempt, rows_by_worker)
        return (*self._ledger, segment)

    def _warn_of_lost_segments(self) -> None:
        """Log once that the history up to now cannot be proved any more."""
        if self._warned_of_ledger or not self._ledger:
            return

        names = set(self._store.list(LEDGER))
        for segment in self._ledger:
            if segment.file.path.rpartition("/")[2] not in names:
                self._warned_of_ledger = True
                log.warning(
                    "%s is missing: training is not affected, but `dist-ft data verify` cannot "
                    "prove the history any more. Restore the file from a copy",
                    self._store.redacted_url(segment.file.path),
                )
                return

    def _write_manifest(self, folder: Store, manifest: Manifest) -> None:
        """Write the manifest, unless a newer attempt has started."""
        fault_injection.hit("checkpoint.before_manifest")
        self._fence.require_latest_record(folder.redacted_url())
        self._require_written(folder, manifest)
        folder.write(manifests.NAME, manifests.serialize_manifest(manifest))

        # Again, as the writes may have taken long: a newer attempt that started meanwhile may have
        # chosen its checkpoint without seeing this one.
        try:
            self._fence.require_current(folder.redacted_url())
        except CheckpointError:
            folder.remove(manifests.NAME)
            raise

        fault_injection.hit("checkpoint.after_manifest")

    def _require_written(self, folder: Store, manifest: Manifest) -> None:
        """Raise StorageError if a file visible here has another length than what was written."""
        # Only a local checkpoint has a layout. Its files are on the nodes of their workers, which
        # rank 0 cannot see.
        is_local = bool(manifest.layout)
        sizes: dict[str, int] = {}
        if not is_local:
            sizes = folder.sizes()

        shared_folder = self._store.child(discovery.FROZEN)
        shared_sizes: dict[str, int] = {}
        if manifest.frozen:
            shared_sizes = shared_folder.sizes()

        for item in manifest.files:
            if item.shared:
                self._require_size(item, shared_folder, shared_sizes, LostSharedError)
            elif not is_local:
                self._require_size(item, folder, sizes, StorageError)

    @staticmethod
    def _require_size(
        item: FileEntry, folder: Store, sizes: dict[str, int], error: type[StorageError]
    ) -> None:
        # An empty file may be missing too, which its length does not show.
        num_bytes = sizes.get(item.path, 0)
        if num_bytes != item.num_bytes or item.path not in sizes:
            raise error(
                f"{folder.redacted_url(item.path)}: has {num_bytes} bytes, but {item.num_bytes} "
                "were written; the storage lost data; the checkpoint is not committed"
            )
