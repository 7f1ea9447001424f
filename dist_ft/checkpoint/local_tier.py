"""Local checkpoints: checkpoints on the disks of the workers' nodes, between those in storage.

They are fast to write and to read, and lost with a node. The manifest is in the run's storage, so
that ordering, fencing and the ledger work as for any checkpoint. The files are on the node of the
worker that wrote them, except those of frozen weights, which are in storage and shared by all
checkpoints. Each worker writes all state it needs and reads only its own files, so a local
checkpoint serves a restart with the same workers, engine and ZeRO stage. It is used only if every
worker finds its files complete; otherwise the latest checkpoint in storage is, and the reason is
logged.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from dist_ft.checkpoint import discovery
from dist_ft.checkpoint import manifest as manifests
from dist_ft.checkpoint.checked_reads import CheckedFiles
from dist_ft.checkpoint.fragments import FragmentReader
from dist_ft.checkpoint.manifest import DamagedError, FileEntry, Manifest
from dist_ft.checkpoint.tier import Tier
from dist_ft.core.errors import DistFtError, StorageError
from dist_ft.core.world import Collectives, World, on_rank0
from dist_ft.storage.filesystem import Store

log = logging.getLogger("dist_ft.checkpoint")


@dataclass(frozen=True)
class LocalTier:
    """The local checkpoints of the run at `store`, as this worker sees them.

    Attributes:
        store: the run's folder in storage.
        local: the run's folder on this node.
        layout: engine, ZeRO stage and number of workers; files of another layout cannot be used.
    """

    store: Store
    local: Store
    layout: str
    world: World
    collectives: Collectives

    def find_latest(self) -> Manifest | None:
        """Return the latest local checkpoint that all workers have the files of. A collective call.

        None if there is none, or if the latest checkpoint in storage is later. Only the lengths of
        files are compared; `load` reads and verifies them.
        """
        for name in on_rank0(self.world, self.collectives, self._list_candidates):
            manifest = self._check_on_all_ranks(name, self._require_files)
            if manifest is not None:
                return manifest
        return None

    def load(
        self, name: str, load_weights: Callable[[Manifest, FragmentReader], None]
    ) -> Manifest | None:
        """Call `load_weights` on all workers with checkpoint `name`.

        Return None if it is damaged on any of them.
        """

        def load(manifest: Manifest) -> None:
            files = CheckedFiles(
                self.checkpoint_folder(manifest.folder_name),
                self._files_of_worker(manifest),
                shared=self.store.child(discovery.FROZEN),
                unreadable_is_damaged=True,
            )
            load_weights(manifest, FragmentReader(files))

        return self._check_on_all_ranks(name, load)

    def _require_files(self, manifest: Manifest) -> None:
        try:
            # Each worker checks its own files only: those of others are on other nodes.
            own_files = [item for item in self._files_of_worker(manifest) if not item.shared]
            discovery.require_files(self.checkpoint_folder(manifest.folder_name), own_files)
        except StorageError as error:
            # The node's own disk failed, which only damages this checkpoint.
            raise DamagedError(str(error)) from error

        # Outside the `try`: if the run's storage does not respond, falling back would not help.
        discovery.require_shared_files(self.store, manifest)

    def _check_on_all_ranks(self, name: str, check: Callable[[Manifest], None]) -> Manifest | None:
        def check_layout_first(manifest: Manifest) -> None:
            if manifest.layout != self.layout:
                raise DamagedError(
                    f"it was written by {manifest.layout}, this run has {self.layout}"
                )

            check(manifest)

        manifest, problem = discovery.check_on_all_ranks(
            self.store, name, self.world, self.collectives, check_layout_first, Tier.LOCAL
        )
        if not problem:
            return manifest

        if self.world.rank == 0:
            log.warning("local checkpoint %s is skipped: %s", name, problem)
        return None

    def _list_candidates(self) -> list[str]:
        """Return the local checkpoints not older than the latest in storage, latest first."""
        in_storage = discovery.list_committed(self.store)
        names = discovery.list_committed(self.store, Tier.LOCAL)
        if not in_storage:
            return names

        # The same step may be in both tiers. Then the local files are faster to read.
        oldest = discovery.sort_key(in_storage[0])
        return [name for name in names if discovery.sort_key(name) >= oldest]

    def _files_of_worker(self, manifest: Manifest) -> list[FileEntry]:
        # The name that `Writer` gives to files.
        prefix = f"rank-{self.world.rank:05d}-"
        return [item for item in manifest.files if item.shared or item.path.startswith(prefix)]

    def latest_attempt(self) -> int:
        """Return the highest attempt number of the files on this node; 0 without any."""
        attempts = [0]
        for name in self.list_removable():
            parsed = manifests.parse_folder(name)
            if parsed is not None:
                attempts.append(parsed.attempt)
        return max(attempts)

    def checkpoint_folder(self, name: str) -> Store:
        """Return the folder of checkpoint `name` on this node."""
        return self.local.child(name)

    def remove_manifests(self, keep: str = "") -> None:
        """Remove all manifests of local checkpoints except that of `keep` (rank 0 only)."""
        for name in discovery.list_committed(self.store, Tier.LOCAL):
            if name != keep:
                # The manifest first: object stores remove the files of a folder one by one.
                self.store.remove(f"{discovery.LOCAL_FOLDER}/{name}/{manifests.NAME}")
                self.store.remove(f"{discovery.LOCAL_FOLDER}/{name}")

    def list_removable(self, keep: str = "", upto: str = "") -> list[str]:
        """Return the checkpoints on this node except `keep`.

        With `upto`, a checkpoint of this attempt: only those of earlier steps or attempts, and
        `upto` itself.
        """
        # Without `upto`, every step and attempt is earlier.
        max_step, current_attempt = manifests.parse_folder(upto) or (2**62, 2**62)
        try:
            names = self.local.list()
        except DistFtError as error:
            # Files that stay take space on the node but are never loaded: their manifest is gone.
            log.debug("%s cannot be listed: %s", self.local.redacted_url(), error)
            return []

        removable = []
        for name in names:
            parsed = manifests.parse_folder(name)
            if parsed is None or name == keep:
                continue

            if parsed.step < max_step or parsed.attempt < current_attempt or name == upto:
                removable.append(name)
        return removable

    def remove(self, names: Iterable[str]) -> None:
        """Remove the files of checkpoints from this node.

        Another worker of the node may be doing the same.
        """
        for name in names:
            try:
                self.local.remove(name)
            except DistFtError as error:
                log.debug("%s was not removed: %s", self.local.redacted_url(name), error)
