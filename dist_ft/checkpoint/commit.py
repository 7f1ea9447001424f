"""The commit of a save whose files are all written: ledger, manifest, retention. Rank 0's, in the background.

Guarantees: the manifest is written last, after every file was seen to be as long as what was written; a worker of an
older attempt does not commit, and takes back what it committed while a newer one began.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import wait
from datetime import datetime, timezone
from importlib.metadata import version

import numpy as np

from dist_ft.checkpoint import discovery, retention
from dist_ft.checkpoint import manifest as manifests
from dist_ft.checkpoint.ledger import write_segment
from dist_ft.checkpoint.local_tier import LocalTier
from dist_ft.checkpoint.manifest import FileEntry, LedgerEntry, Manifest
from dist_ft.checkpoint.save_status import LostSharedError, SaveInProgress
from dist_ft.config.schema import CheckpointSection
from dist_ft.core import fault_injection
from dist_ft.core.errors import CheckpointError, StorageError
from dist_ft.storage.filesystem import Store

log = logging.getLogger("dist_ft.checkpoint")


class Committer:
    """The commits of one attempt at the run at `store`, by `num_workers` workers."""

    def __init__(
        self,
        store: Store,
        section: CheckpointSection,
        num_workers: int,
        attempt: int,
        nodes: LocalTier | None,
    ) -> None:
        """Assign only."""
        self._store = store
        self._section = section
        self._num_workers = num_workers
        self._attempt = attempt
        self._nodes = nodes
        self._ledger: tuple[LedgerEntry, ...] = ()
        self._shared: tuple[FileEntry, ...] = ()
        self._loose: str | None = None
        self._origin: int | None = None

    def go_on_from(self, manifest: Manifest | None) -> None:
        """Take a checkpoint for the end of the history that this attempt goes on with."""
        self._ledger, self._loose = (manifest.ledger if manifest else ()), None
        self._origin = manifest.progress.step if manifest else -1
        self._shared = tuple(item for item in manifest.files if item.shared) if manifest else ()

    def commit(
        self,
        save: SaveInProgress,
        files: tuple[FileEntry, ...],
        frozen: frozenset[str],
        rows: Sequence[np.ndarray],
    ) -> None:
        """Check that the files are there, write ledger and manifest, prune.

        Args:
            save: all of its files are written.
            files: of all workers; where none of them are shared, those of the checkpoint before are taken over.
            frozen: names of the weights in shared files.
            rows: of the ledger, by worker.
        """
        draft, nodes = save.draft, self._nodes if save.draft.on_nodes else None
        folder = self._store.child(f"{discovery.LOCAL_FOLDER if nodes else discovery.FOLDER}/{save.name}")
        if draft.before is not None:
            wait([draft.before])
        if save.shared is None:
            files += self._shared
        ledger = self._extend_ledger(draft.progress.step, rows)
        self._seal(
            folder,
            Manifest(
                format_version=manifests.FORMAT_VERSION if frozen else 1,
                run=draft.run,
                attempt=self._attempt,
                world_size=self._num_workers,
                engine=draft.engine,
                progress=draft.progress,
                tensors=draft.tensors,
                aliases=draft.aliases,
                files=files,
                ledger=ledger,
                frozen=tuple(sorted(frozen)),
                evaluation=draft.evaluation,
                layout=nodes.layout if nodes else "",
                created_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
                versions={
                    name: version(name)
                    for name in ("torch", "transformers", "safetensors", "deepspeed", "ray", "peft")
                },
            ),
        )
        self._shared = tuple(item for item in files if item.shared)
        if nodes is None:
            self._ledger = ledger
            retention.remove_unretained(self._store, self._section, self._attempt, self._origin, save.name)
        self.forget_on_nodes(save.name if nodes else "", ledger)
        self._loose = ledger[-1].file.path if nodes and ledger != self._ledger else None

    def forget_on_nodes(self, keep: str, ledger: tuple[LedgerEntry, ...] = ()) -> None:
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
        fault_injection.hit("checkpoint.before_manifest")
        self._require_current(folder)
        self._require_written(folder, manifest)
        folder.write(manifests.NAME, manifests.serialize_manifest(manifest))
        try:
            self._require_current(folder)  # that write may have taken long
        except CheckpointError:
            folder.remove(manifests.NAME)
            raise
        fault_injection.hit("checkpoint.after_manifest")

    def _require_written(self, folder: Store, manifest: Manifest) -> None:
        """Raise StorageError if a file that can be seen from here is not as long as what was written."""
        own = folder.sizes() if not manifest.layout else {}
        shared = self._store.child(discovery.FROZEN).sizes() if manifest.frozen else {}
        for item in manifest.files:
            if manifest.layout and not item.shared:
                continue  # on its worker's node
            where, found = (
                (self._store.child(discovery.FROZEN), shared) if item.shared else (folder, own)
            )
            if found.get(item.path) != item.num_bytes:
                kind = LostSharedError if item.shared else StorageError
                raise kind(
                    f"{where.shown(item.path)}: {found.get(item.path, 0)} bytes are there, {item.num_bytes} "
                    "were written; the storage lost some; checkpoint not committed"
                )

    def _require_current(self, folder: Store) -> None:
        newest = discovery.latest_attempt(self._store)
        if newest > self._attempt:
            raise CheckpointError(
                f"{folder.shown()}: attempt {self._attempt} must not commit, attempt {newest} has "
                "taken over the run; this process ends"
            )
