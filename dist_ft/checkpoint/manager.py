"""Saving, finding and loading the checkpoints of one run.

Guarantees: a checkpoint exists when its manifest does, and the manifest is written last, by rank 0, after every file
was written and its length read back; a checkpoint whose files do not match is passed over for the one before, and the
log says why; a worker of an older attempt does not commit. Attempts are numbered by files created exclusively.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import version

import numpy as np
import torch

from dist_ft import failpoints
from dist_ft.checkpoint import manifest as manifests
from dist_ft.checkpoint.fragments import Fragment, FragmentReader, Wanted, serialise
from dist_ft.checkpoint.ledger import write_segment
from dist_ft.checkpoint.manifest import FileEntry, LedgerEntry, Manifest, Progress, TensorInfo
from dist_ft.config.schema import CheckpointSection
from dist_ft.engine.base import Engine, Slot
from dist_ft.errors import CheckpointError, DistFtError, StorageError
from dist_ft.storage import Store
from dist_ft.world import Collectives, World, on_rank0, raise_together

log = logging.getLogger("dist_ft.checkpoint")
FOLDER = "checkpoints"
ATTEMPTS = "attempts"


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

    def newest(self) -> Manifest | None:
        """Return the newest sound checkpoint, the same on all ranks; this attempt's history goes on from it."""
        manifest = newest(self._store, self._world, self._collectives)
        self._ledger = manifest.ledger if manifest else ()
        return manifest

    def load(self, manifest: Manifest, engine: Engine) -> None:
        """Fill the engine's slots from a checkpoint of any world, stage or engine."""
        slots = list(engine.slots())
        wanted = [Wanted(i, slot.name, slot.key, slot.offset, slot.numel) for i, slot in enumerate(slots)]
        problem: DistFtError | None = None
        try:
            for index, values in reader(self._store, manifest).read_many(wanted):
                slots[index].write(torch.from_numpy(values))
        except DistFtError as error:
            problem = error
        raise_together(self._collectives, problem)
        engine.finish_load(manifest.progress.optimizer_step)

    def save(self, engine: Engine, progress: Progress, ledger_rows: np.ndarray, *, run: str, aliases: dict[str, str],
             tensors: dict[str, TensorInfo], evaluation: dict[str, float]) -> str:
        """Commit a checkpoint and return its URL; a collective call. Raises on all ranks if any rank fails."""
        name = manifests.folder_name(progress.step, self._attempt)
        folder = self._store.child(f"{FOLDER}/{name}")
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
                ledger=ledger,
                evaluation=evaluation, created_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
                versions={name: version(name) for name in ("torch", "transformers", "safetensors")}))
            self._ledger = ledger

        on_rank0(self._world, self._collectives, commit)
        if self._world.rank == 0:
            self._prune(name)
        return folder.url

    def _extend_ledger(self, step: int, parts: Sequence[np.ndarray]) -> tuple[LedgerEntry, ...]:
        start = self._ledger[-1].stop if self._ledger else 0
        if step == start:
            return self._ledger
        return (*self._ledger, write_segment(self._store, start, step, self._attempt, parts))

    def _commit(self, folder: Store, manifest: Manifest) -> None:
        """Write the manifest, unless a newer attempt has started meanwhile."""
        failpoints.hit("checkpoint.before_manifest")
        newest = newest_attempt(self._store)
        if newest > self._attempt:
            raise CheckpointError(f"{folder.url}: attempt {self._attempt} must not commit, attempt {newest} has taken "
                                  "over the run; this process ends")
        for item in manifest.files:
            if folder.size(item.path) != item.num_bytes:
                raise StorageError(f"{folder.full(item.path)}: {folder.size(item.path)} bytes are there, "
                                   f"{item.num_bytes} were written; the storage lost some; checkpoint not committed")
        folder.write(manifests.NAME, manifest.model_dump_json(indent=1).encode())
        failpoints.hit("checkpoint.after_manifest")

    def _prune(self, newest: str) -> None:
        """Remove checkpoints that retention does not keep, and torn ones of older attempts; manifests go first."""
        try:
            names = committed(self._store)
            keep = set(kept(names, self._section)) | {newest}
            torn = [name for name in self._store.list(FOLDER) if name not in names and _attempt(name) < self._attempt]
            for name in [name for name in names if name not in keep] + torn:
                self._store.remove(f"{FOLDER}/{name}/{manifests.NAME}")
                self._store.remove(f"{FOLDER}/{name}")
        except StorageError as error:
            log.warning("old checkpoints were not removed: %s", error)


def newest(store: Store, world: World, collectives: Collectives) -> Manifest | None:
    """Return the newest checkpoint whose every file matches its manifest, or None; a collective call.

    The files are shared out over the ranks for verification. What is passed over is logged with the reason.
    """
    for name in collectives.broadcast(committed(store) if world.rank == 0 else None):
        manifest, problem = None, ""
        try:
            manifest = load_manifest(store, name)
            verify(store, manifest, world)
        except DistFtError as error:
            problem = str(error)
        problems = [text for text in collectives.all_gather(problem) if text]
        if not problems:
            return manifest
        if world.rank == 0:
            log.warning("checkpoint %s is passed over: %s", name, problems[0])
    return None


def _attempt(name: str) -> int:
    parsed = manifests.parse_folder(name)
    return parsed[1] if parsed else 2**31


def kept(names: Sequence[str], section: CheckpointSection) -> list[str]:
    """Return which of `names` (newest first) retention keeps."""
    steps = {name: (manifests.parse_folder(name) or (0, 0))[0] for name in names}
    every = section.keep_every_steps
    return [name for i, name in enumerate(names) if i < section.keep_last or (every and steps[name] % every == 0)]


def committed(store: Store) -> list[str]:
    """Return the names of all checkpoints that have a manifest, newest first."""
    names = [name for name in store.list(FOLDER) if manifests.parse_folder(name)]
    names.sort(key=lambda name: manifests.parse_folder(name) or (0, 0), reverse=True)
    return [name for name in names if store.exists(f"{FOLDER}/{name}/{manifests.NAME}")]


def load_manifest(store: Store, name: str) -> Manifest:
    """Read the manifest of checkpoint `name`."""
    path = f"{FOLDER}/{name}/{manifests.NAME}"
    return manifests.parse(store.read(path), store.full(path))


def verify(store: Store, manifest: Manifest, world: World) -> None:
    """Check length and checksum of this rank's share of the files; raises CheckpointError that differs."""
    folder = checkpoint_store(store, manifest)
    for index in world.share(len(manifest.files)):
        item = manifest.files[index]
        content = folder.read(item.path)
        if len(content) != item.num_bytes:
            raise CheckpointError(f"{folder.full(item.path)}: {len(content)} bytes, the manifest says {item.num_bytes}")
        if manifests.checksum(content) != item.checksum:
            raise CheckpointError(f"{folder.full(item.path)}: its checksum differs from the manifest's")


def checkpoint_store(store: Store, manifest: Manifest) -> Store:
    """Return the folder of a checkpoint of the run at `store`."""
    return store.child(f"{FOLDER}/{manifests.folder_name(manifest.progress.step, manifest.attempt)}")


def reader(store: Store, manifest: Manifest) -> FragmentReader:
    """Return a reader of the checkpoint's fragments."""
    return FragmentReader(checkpoint_store(store, manifest), [(f.path, f.num_bytes) for f in manifest.files])


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


def newest_attempt(store: Store) -> int:
    """Return the highest attempt number of the run; 0 before the first."""
    return max((int(name[:-5]) for name in store.list(ATTEMPTS) if name.endswith(".json")), default=0)


def begin_attempt(store: Store, world_size: int) -> int:
    """Take the next attempt number of the run for this process and its peers (call on rank 0)."""
    number = newest_attempt(store)
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    while True:
        number += 1
        note = json.dumps({"attempt": number, "world_size": world_size, "started_at": started})
        if store.create(f"{ATTEMPTS}/{number:06d}.json", note.encode()):
            return number
