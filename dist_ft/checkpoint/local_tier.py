"""Checkpoints on the workers' own nodes, between those in storage: quick to write, quick to read, gone with a node.

The manifest lies in the run's storage (so order, fencing and the ledger are those of any checkpoint), the files on the
node of the worker that wrote them (those of frozen weights in storage, where all checkpoints share them). Each worker
writes all it would need, and reads only its own: such a checkpoint serves a restart of the same workers, engine and
stage. Guarantees: it is taken only if every worker finds its files whole; else the newest in storage is, and the log
says why.
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
from dist_ft.core.errors import DistFtError, StorageError
from dist_ft.core.world import Collectives, World, on_rank0
from dist_ft.storage.filesystem import Store

log = logging.getLogger("dist_ft.checkpoint")


@dataclass(frozen=True)
class LocalTier:
    """What the workers' nodes hold of the run at `store`.

    Attributes:
        here: the run's folder on this node.
        layout: who writes what: engine, stage, number of workers. Another layout's files are of no use.
    """

    store: Store
    here: Store
    layout: str
    world: World
    collectives: Collectives

    def newest(self) -> Manifest | None:
        """Return the newest checkpoint, unless storage has a newer one, of which all workers find their files.

        A collective call. Lengths are compared, no file is read: `load` does that.
        """
        for name in on_rank0(self.world, self.collectives, self._candidates):
            manifest = self._taken(name, self._require_there)
            if manifest is not None:
                return manifest
        return None

    def _require_there(self, manifest: Manifest) -> None:
        try:
            own = [item for item in self._own(manifest) if not item.shared]
            discovery.require_files(self.files(_name(manifest)), own)
        except (
            StorageError
        ) as error:  # of this node's own disk; the run's storage is another matter
            raise DamagedError(str(error)) from error
        discovery.require_shared_files(self.store, manifest)

    def load(self, name: str, fill: Callable[[Manifest, FragmentReader], None]) -> Manifest | None:
        """Let all workers `fill` themselves from checkpoint `name`; return it, or None if some find it damaged."""
        shared = self.store.child(discovery.FROZEN)
        return self._taken(
            name,
            lambda found: fill(
                found,
                FragmentReader(
                    CheckedFiles(self.files(_name(found)), self._own(found), shared, own_disk=True)
                ),
            ),
        )

    def _taken(self, name: str, take: Callable[[Manifest], None]) -> Manifest | None:
        def guarded(manifest: Manifest) -> None:
            if manifest.layout != self.layout:
                raise DamagedError(f"it is of {manifest.layout}, this is {self.layout}")
            take(manifest)

        manifest, problem = discovery.check_on_all_ranks(
            self.store, name, self.world, self.collectives, guarded, discovery.LOCAL_FOLDER
        )
        if problem and self.world.rank == 0:
            log.warning("checkpoint %s on the nodes is passed over: %s", name, problem)
        return None if problem else manifest

    def _candidates(self) -> list[str]:
        """Return the checkpoints that are not older than the newest in storage, newest first."""
        newest = discovery.list_committed(self.store)[:1]
        return [
            name
            for name in self._names()
            if not newest or discovery.sort_key(name) >= discovery.sort_key(newest[0])
        ]

    def _names(self) -> list[str]:
        return discovery.list_committed(self.store, discovery.LOCAL_FOLDER)

    def _own(self, manifest: Manifest) -> list[FileEntry]:
        return [
            item
            for item in manifest.files
            if item.shared or item.path.startswith(f"rank-{self.world.rank:05d}-")
        ]

    def files(self, name: str) -> Store:
        """Return where the files of checkpoint `name` lie on this node."""
        return self.here.child(name)

    def forget(self, keep: str = "") -> None:
        """Remove manifests but that of `keep` (rank 0)."""
        for name in self._names():
            if name != keep:
                self.store.remove(f"{discovery.LOCAL_FOLDER}/{name}/{manifests.NAME}")
                self.store.remove(f"{discovery.LOCAL_FOLDER}/{name}")

    def others(self, keep: str = "", before: str = "") -> list[str]:
        """Return what lies on this node but `keep`; with `before`, a checkpoint of this attempt, only what is older."""
        step, attempt = manifests.parse_folder(before) or (2**62, 2**62)
        try:
            found = [(name, manifests.parse_folder(name)) for name in self.here.list()]
        except DistFtError as error:
            log.debug("%s can not be listed: %s", self.here.shown(), error)
            return []
        return [
            name
            for name, own in found
            if own is not None
            and name != keep
            and (own[0] < step or own[1] < attempt or name == before)
        ]

    def remove(self, names: Iterable[str]) -> None:
        """Remove files of checkpoints from this node; another worker of it may be doing the same."""
        for name in names:
            try:
                self.here.remove(name)
            except DistFtError as error:
                log.debug("%s was not removed: %s", self.here.shown(name), error)


def _name(manifest: Manifest) -> str:
    return manifests.folder_name(manifest.progress.step, manifest.attempt)
