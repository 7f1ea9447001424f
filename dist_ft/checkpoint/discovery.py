"""What is in a run's storage: its checkpoints, which of them is the newest sound one, and its attempts.

Guarantees: a checkpoint whose files do not match its manifest is passed over for the one before, and the log says why;
attempts are numbered by files created exclusively. Writes nothing else.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable
from datetime import datetime, timezone

from dist_ft.checkpoint import manifest as manifests
from dist_ft.checkpoint.checked_reads import CheckedFiles
from dist_ft.checkpoint.fragments import MAX_REQUEST_BYTES, FragmentReader, gather_index
from dist_ft.checkpoint.manifest import DamagedError, FileEntry, Manifest
from dist_ft.core.errors import PLANNED, CheckpointError, DistFtError, StorageError
from dist_ft.core.logs import redact
from dist_ft.core.world import Collectives, World, on_rank0
from dist_ft.storage.filesystem import Store

log = logging.getLogger("dist_ft.checkpoint")
FOLDER = "checkpoints"
LOCAL_FOLDER = "node-checkpoints"
"""Folder of the manifests of checkpoints that lie on the workers' nodes."""
ATTEMPTS = "attempts"
FROZEN = "frozen"
"""Folder of a run with the files of weights that do not learn: checkpoints share them."""


def find_latest(
    store: Store,
    world: World,
    collectives: Collectives,
    take: Callable[[Manifest], None] | None = None,
    upto: str = "",
) -> Manifest | None:
    """Return the newest checkpoint that is what was written; None before the first; a collective call.

    What is passed over is logged with the reason. Storage that does not answer, or a checkpoint of a newer dist_ft, is
    an error: the run must not go back because of it. So is a run of which no checkpoint is sound: to begin again is for
    its owner to decide.

    Args:
        store: the run's folder.
        world: this process among its peers.
        collectives: how they talk.
        take: raises DamagedError if the checkpoint is not what was written, on any rank, and any other error to end
            the search; by default every file is read and held against the manifest, shared out over the ranks.
        upto: name of the newest checkpoint that comes into question.
    """
    take = take or (lambda manifest: verify_checksums(store, manifest, world))
    names = on_rank0(world, collectives, lambda: list_committed(store))
    names = [name for name in names if not upto or sort_key(name) <= sort_key(upto)]
    first = ""
    for name in names:
        manifest, problem = check_on_all_ranks(store, name, world, collectives, take)
        if not problem:
            return manifest
        if world.rank == 0:
            log.warning("checkpoint %s is passed over: %s", name, problem)
        first = first or problem
    if names:
        raise CheckpointError(
            f"{store.shown(FOLDER)}: none of the {len(names)} committed checkpoints can be loaded "
            f"(the newest: {first}); restore one from a copy, or move the folder away to begin again"
        )
    return None


def check_on_all_ranks(
    store: Store,
    name: str,
    world: World,
    collectives: Collectives,
    take: Callable[[Manifest], None],
    folder: str = FOLDER,
) -> tuple[Manifest | None, str]:
    """Return a checkpoint's manifest, taken by all ranks, and how it is damaged: the same on all ranks."""
    try:
        manifest = on_rank0(world, collectives, lambda: load_manifest(store, name, folder))
    except DamagedError as error:
        return None, str(error)
    problem: DistFtError | None = None
    try:
        take(manifest)
    except DistFtError as error:
        problem = error
    problems = [error for error in collectives.all_gather(problem) if error is not None]
    for failure in problems:
        if not isinstance(failure, DamagedError):
            raise failure
    return manifest, str(problems[0]) if problems else ""


def list_committed(store: Store, folder: str = FOLDER) -> list[str]:
    """Return the names of all checkpoints in `folder` that have a manifest, newest first."""
    names = [name for name in store.list(folder) if manifests.parse_folder(name)]
    names.sort(key=sort_key, reverse=True)
    return [name for name in names if store.exists(f"{folder}/{name}/{manifests.NAME}")]


def sort_key(name: str) -> tuple[int, int]:
    """Return what checkpoints are ordered by: what a newer attempt committed is newer, whatever its step."""
    step, attempt = manifests.parse_folder(name) or (0, 0)
    return attempt, step


def load_manifest(store: Store, name: str, folder: str = FOLDER) -> Manifest:
    """Read the manifest of checkpoint `name`; raises DamagedError if it is not sound or another's."""
    path = f"{folder}/{name}/{manifests.NAME}"
    try:
        content = store.read(path)
    except StorageError as error:
        if isinstance(
            error.__cause__, FileNotFoundError
        ):  # the checkpoint's fault, not the storage's
            raise DamagedError(f"{store.shown(path)}: the file is not there") from error
        raise
    manifest = manifests.parse_manifest(content, store.shown(path))
    own = manifests.folder_name(manifest.progress.step, manifest.attempt)
    if own != name:
        raise DamagedError(
            f"{store.shown(path)}: is the manifest of {own}; a checkpoint may not be copied or "
            "renamed; it will not be loaded"
        )
    return manifest


def require_complete(store: Store, manifest: Manifest) -> None:
    """Raise DamagedError if a file is missing or has another length: one listing tells, no file is read."""
    require_files(
        checkpoint_store(store, manifest), [item for item in manifest.files if not item.shared]
    )
    require_shared_files(store, manifest)


def require_shared_files(store: Store, manifest: Manifest) -> None:
    """Do as `require_whole` for the files it shares with other checkpoints."""
    shared = [item for item in manifest.files if item.shared]
    if shared:
        require_files(store.child(FROZEN), shared)


def require_files(folder: Store, files: Iterable[FileEntry]) -> None:
    """Raise DamagedError if one of `files` is missing in `folder`, or has another length."""
    there = folder.sizes()
    for item in files:
        if item.path not in there:
            raise DamagedError(f"{folder.shown(item.path)}: the file is not there")
        if there[item.path] != item.num_bytes:
            raise DamagedError(
                f"{folder.shown(item.path)}: {there[item.path]} bytes, the manifest says "
                f"{item.num_bytes}"
            )


def verify_checksums(store: Store, manifest: Manifest, world: World) -> None:
    """Check length and checksum of this rank's share of the files; raises DamagedError where they differ."""
    require_complete(store, manifest)
    files = _files(store, manifest)
    own = [manifest.files[index] for index in world.share(len(manifest.files))]
    windows = [
        (item.path, start, min(item.num_bytes, start + width))
        for item in own
        for width in [files.window(item.path, MAX_REQUEST_BYTES)]
        for start in range(0, item.num_bytes, width)
    ]
    for _ in files.read_all(windows):
        pass


def _files(store: Store, manifest: Manifest) -> CheckedFiles:
    return CheckedFiles(checkpoint_store(store, manifest), manifest.files, store.child(FROZEN))


def checkpoint_store(store: Store, manifest: Manifest) -> Store:
    """Return the folder of a checkpoint of the run at `store`."""
    return store.child(
        f"{FOLDER}/{manifests.folder_name(manifest.progress.step, manifest.attempt)}"
    )


def open_reader(store: Store, manifest: Manifest) -> FragmentReader:
    """Return a reader of the checkpoint's fragments."""
    return FragmentReader(_files(store, manifest))


def open_reader_together(
    store: Store, manifest: Manifest, world: World, collectives: Collectives
) -> FragmentReader:
    """Return a reader of the checkpoint's fragments, the headers read by all ranks together; a collective call."""
    files = _files(store, manifest)
    return FragmentReader(files, gather_index(files, world, collectives))


def latest_attempt(store: Store) -> int:
    """Return the highest attempt number of the run; 0 before the first."""
    numbers = (name.removesuffix(".json") for name in store.list(ATTEMPTS))
    return max(
        (int(number) for number in numbers if number.isascii() and number.isdigit()), default=0
    )


def start_attempt(store: Store, world_size: int, after: str = "") -> int:
    """Take the next attempt number of the run for this process and its peers (call on rank 0).

    `after`: why the attempt before ended, where it is known; one that was not planned counts as a failure.
    """
    number = latest_attempt(store)
    failures = num_failures(store, number) + bool(after and not after.startswith(PLANNED))
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    while True:
        number += 1
        note = json.dumps(
            {
                "attempt": number,
                "world_size": world_size,
                "started_at": started,
                "failures": failures,
                **({"after": redact(after)} if after else {}),
            }
        )
        if store.create(f"{ATTEMPTS}/{number:06d}.json", note.encode()):
            return number


def num_failures(store: Store, attempt: int) -> int:
    """Return how many attempts up to the start of `attempt` ended in a failure that was noticed."""
    try:
        return (
            int(json.loads(store.read(f"{ATTEMPTS}/{attempt:06d}.json")).get("failures", 0))
            if attempt
            else 0
        )
    except (StorageError, ValueError, AttributeError):
        return 0
