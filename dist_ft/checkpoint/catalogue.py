"""What is in a run's storage: its checkpoints, which of them is the newest sound one, and its attempts.

Guarantees: a checkpoint whose files do not match its manifest is passed over for the one before, and the log says why;
attempts are numbered by files created exclusively. Writes nothing else.
"""

from __future__ import annotations

import json
import logging
from datetime import datetime, timezone

from dist_ft.checkpoint import manifest as manifests
from dist_ft.checkpoint.fragments import FragmentReader
from dist_ft.checkpoint.manifest import FileEntry, Manifest
from dist_ft.errors import PLANNED, CheckpointError, DistFtError, StorageError
from dist_ft.logs import redact
from dist_ft.storage import Store
from dist_ft.world import Collectives, World, on_rank0, raise_together

log = logging.getLogger("dist_ft.checkpoint")
FOLDER = "checkpoints"
ATTEMPTS = "attempts"


def newest(store: Store, world: World, collectives: Collectives) -> Manifest | None:
    """Return the newest checkpoint whose every file matches its manifest; None before the first; a collective call.

    The files are shared out over the ranks for verification. What is passed over is logged with the reason. Storage
    that does not answer, or a checkpoint of a newer dist_ft, is an error: the run must not go back because of it. So
    is a run of which no checkpoint is sound: to begin again is for its owner to decide.
    """
    names = on_rank0(world, collectives, lambda: committed(store))
    first = ""
    for name in names:
        manifest, problem = None, ""
        failure: DistFtError | None = None
        try:
            manifest = load_manifest(store, name)
            verify(store, manifest, world)
        except (StorageError, manifests.NewerFormatError) as error:
            failure = error
        except CheckpointError as error:
            problem = str(error)
        raise_together(collectives, failure)
        problems = [text for text in collectives.all_gather(problem) if text]
        if not problems:
            return manifest
        if world.rank == 0:
            log.warning("checkpoint %s is passed over: %s", name, problems[0])
        first = first or problems[0]
    if names:
        raise CheckpointError(f"{store.shown(FOLDER)}: none of the {len(names)} committed checkpoints can be loaded "
                              f"(the newest: {first}); restore one from a copy, or move the folder away to begin again")
    return None


def committed(store: Store, folder: str = FOLDER) -> list[str]:
    """Return the names of all checkpoints in `folder` that have a manifest, newest first."""
    names = [name for name in store.list(folder) if manifests.parse_folder(name)]
    names.sort(key=lambda name: manifests.parse_folder(name) or (0, 0), reverse=True)
    return [name for name in names if store.exists(f"{folder}/{name}/{manifests.NAME}")]


def load_manifest(store: Store, name: str, folder: str = FOLDER) -> Manifest:
    """Read the manifest of checkpoint `name`; raises CheckpointError if it is not sound or another's."""
    path = f"{folder}/{name}/{manifests.NAME}"
    manifest = manifests.parse(_read(store, path), store.shown(path))
    own = manifests.folder_name(manifest.progress.step, manifest.attempt)
    if own != name:
        raise CheckpointError(f"{store.shown(path)}: is the manifest of {own}; a checkpoint may not be copied or "
                              "renamed; it will not be loaded")
    return manifest


def _read(store: Store, path: str) -> bytes:
    """Return a file of a checkpoint; that it is absent is the checkpoint's fault, not the storage's."""
    try:
        return store.read(path)
    except StorageError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise CheckpointError(f"{store.shown(path)}: the file is not there") from error
        raise


def verify(store: Store, manifest: Manifest, world: World) -> None:
    """Check length and checksum of this rank's share of the files; raises CheckpointError where they differ."""
    folder = checkpoint_store(store, manifest)
    for index in world.share(len(manifest.files)):
        item = manifest.files[index]
        problem = damage(folder, item) and damage(folder, item)  # what was spoilt on the way comes well again
        if problem:
            raise CheckpointError(f"{folder.shown(item.path)}: {problem}")


def damage(folder: Store, item: FileEntry) -> str:
    """Say how a file differs from its manifest; "" if it does not."""
    content = _read(folder, item.path)
    if len(content) != item.num_bytes:
        return f"{len(content)} bytes, the manifest says {item.num_bytes}"
    return "" if manifests.checksum(content) == item.checksum else "its checksum differs from the manifest's"


def checkpoint_store(store: Store, manifest: Manifest) -> Store:
    """Return the folder of a checkpoint of the run at `store`."""
    return store.child(f"{FOLDER}/{manifests.folder_name(manifest.progress.step, manifest.attempt)}")


def reader(store: Store, manifest: Manifest) -> FragmentReader:
    """Return a reader of the checkpoint's fragments."""
    return FragmentReader(checkpoint_store(store, manifest), [(f.path, f.num_bytes) for f in manifest.files])


def newest_attempt(store: Store) -> int:
    """Return the highest attempt number of the run; 0 before the first."""
    numbers = (name.removesuffix(".json") for name in store.list(ATTEMPTS))
    return max((int(number) for number in numbers if number.isascii() and number.isdigit()), default=0)


def begin_attempt(store: Store, world_size: int, after: str = "") -> int:
    """Take the next attempt number of the run for this process and its peers (call on rank 0).

    `after`: why the attempt before ended, where it is known; one that was not planned counts as a failure.
    """
    number = newest_attempt(store)
    failures = num_failures(store, number) + bool(after and not after.startswith(PLANNED))
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    while True:
        number += 1
        note = json.dumps({"attempt": number, "world_size": world_size, "started_at": started, "failures": failures,
                           **({"after": redact(after)} if after else {})})
        if store.create(f"{ATTEMPTS}/{number:06d}.json", note.encode()):
            return number


def num_failures(store: Store, attempt: int) -> int:
    """Return how many attempts up to the start of `attempt` ended in a failure that was noticed."""
    try:
        return int(json.loads(store.read(f"{ATTEMPTS}/{attempt:06d}.json")).get("failures", 0)) if attempt else 0
    except (StorageError, ValueError, AttributeError):
        return 0
