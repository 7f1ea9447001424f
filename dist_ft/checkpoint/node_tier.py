"""Checkpoints on the workers' own nodes, between those in storage: quick to write, quick to read, gone with a node.

The manifest lies in the run's storage (so order, fencing and the ledger are those of any checkpoint), the files on the
node of the worker that wrote them. Each worker writes all it would need, and reads only its own: such a checkpoint
serves a restart of the same workers, engine and stage. Guarantees: it is taken only if every worker finds its files
whole; else the newest in storage is, and the log says why.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from dist_ft.checkpoint import catalogue
from dist_ft.checkpoint import manifest as manifests
from dist_ft.checkpoint.fragments import FragmentReader
from dist_ft.checkpoint.manifest import FileEntry, Manifest
from dist_ft.errors import CheckpointError, DistFtError
from dist_ft.storage import Store
from dist_ft.world import Collectives, World, on_rank0

log = logging.getLogger("dist_ft.checkpoint")
FOLDER = "node-checkpoints"


@dataclass(frozen=True)
class NodeTier:
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

    def newest(self, at_least: int) -> Manifest | None:
        """Return the newest checkpoint of a step >= `at_least` that all workers find whole; a collective call."""
        names = on_rank0(self.world, self.collectives, self._names)
        for name in names:
            if (manifests.parse_folder(name) or (0, 0))[0] < at_least:
                break
            manifest, problem = None, ""
            try:
                manifest = catalogue.load_manifest(self.store, name, FOLDER)
                problem = self._problem(manifest)
            except DistFtError as error:
                problem = str(error)
            problems = [text for text in self.collectives.all_gather(problem) if text]
            if not problems:
                return manifest
            if self.world.rank == 0:
                log.warning("checkpoint %s on the nodes is passed over: %s", name, problems[0])
        return None

    def _names(self) -> list[str]:
        return catalogue.committed(self.store, FOLDER)

    def _problem(self, manifest: Manifest) -> str:
        if manifest.layout != self.layout:
            return f"it is of {manifest.layout}, this is {self.layout}"
        folder = self.files(manifests.folder_name(manifest.progress.step, manifest.attempt))
        try:
            for item in self._own(manifest):
                damage = catalogue.damage(folder, item)
                if damage:
                    return f"{folder.shown(item.path)}: {damage}"
        except CheckpointError as error:
            return f"{error} (worker {self.world.rank})"
        return ""

    def _own(self, manifest: Manifest) -> list[FileEntry]:
        return [item for item in manifest.files if item.path.startswith(f"rank-{self.world.rank:05d}-")]

    def files(self, name: str) -> Store:
        """Return where the files of checkpoint `name` lie on this node."""
        return self.here.child(name)

    def reader(self, manifest: Manifest) -> FragmentReader:
        """Return a reader of this worker's own files."""
        folder = self.files(manifests.folder_name(manifest.progress.step, manifest.attempt))
        return FragmentReader(folder, [(item.path, item.num_bytes) for item in self._own(manifest)])

    def forget(self, keep: str = "", after: int = -1) -> None:
        """Remove manifests but that of `keep`, if their step is > `after` (rank 0)."""
        for name in self._names():
            if name != keep and (manifests.parse_folder(name) or (0, 0))[0] > after:
                self.store.remove(f"{FOLDER}/{name}/{manifests.NAME}")
                self.store.remove(f"{FOLDER}/{name}")

    def clear(self, keep: str) -> None:
        """Remove from this node what is older than `keep`; another worker of the node may be doing the same."""
        newest = manifests.parse_folder(keep) or (0, 0)
        for name in self.here.list():
            step, attempt = manifests.parse_folder(name) or newest
            if step < newest[0] or attempt < newest[1]:
                try:
                    self.here.remove(name)
                except DistFtError as error:
                    log.debug("%s was not removed: %s", self.here.shown(name), error)
