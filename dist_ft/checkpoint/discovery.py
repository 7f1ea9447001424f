"""Finds the checkpoints of a run in its storage.

A checkpoint whose files do not match its manifest is skipped in favor of the one before, and the
reason is logged. Nothing is written.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

from dist_ft.checkpoint import attempts
from dist_ft.checkpoint import manifest as manifests
from dist_ft.checkpoint.attempts import (
    ATTEMPTS,
    FROZEN,
    latest_attempt,
    num_failures,
    start_attempt,
)
from dist_ft.checkpoint.checked_reads import ByteRange, CheckedFiles
from dist_ft.checkpoint.fragments import MAX_REQUEST_BYTES, FragmentReader, gather_index
from dist_ft.checkpoint.manifest import DamagedError, FileEntry, Manifest
from dist_ft.checkpoint.tier import Tier
from dist_ft.core.errors import CheckpointError, DistFtError, StorageError
from dist_ft.core.world import Collectives, World, on_rank0
from dist_ft.storage.documents import MAX_LARGE_BYTES
from dist_ft.storage.error_messages import UnusableFileError
from dist_ft.storage.filesystem import Store

log = logging.getLogger("dist_ft.checkpoint")
FOLDER = Tier.STORAGE.value
LOCAL_FOLDER = Tier.LOCAL.value

__all__ = [
    "ATTEMPTS",
    "FOLDER",
    "FROZEN",
    "LOCAL_FOLDER",
    "CheckResult",
    "CheckpointOrder",
    "check_on_all_ranks",
    "checkpoint_store",
    "find_latest",
    "latest_attempt",
    "list_committed",
    "load_manifest",
    "num_failures",
    "open_reader",
    "open_reader_together",
    "require_complete",
    "require_files",
    "require_not_emptied",
    "require_shared_files",
    "sort_key",
    "start_attempt",
    "verify_checksums",
]


class CheckResult(NamedTuple):
    """The result of checking one checkpoint on all ranks, the same on all of them.

    Attributes:
        manifest: None if it could not be loaded.
        problem: how the checkpoint is damaged; "" if it is not.
    """

    manifest: Manifest | None
    problem: str


class CheckpointOrder(NamedTuple):
    """Orders checkpoints: one of a later attempt is later, whatever its step."""

    attempt: int
    step: int


def find_latest(
    store: Store,
    world: World,
    collectives: Collectives,
    check: Callable[[Manifest], None] | None = None,
    upto: str = "",
) -> Manifest | None:
    """Return the latest undamaged checkpoint; None if the run has none yet. A collective call.

    Skipped checkpoints are logged with the reason.

    Args:
        store: the run's folder.
        world: this process among its peers.
        collectives: the control channel.
        check: called on all ranks for each candidate. It raises DamagedError if the checkpoint is
            damaged, and any other error to end the search. Default: all files are read and
            verified; each rank reads a share.
        upto: name of the latest checkpoint to consider. Default: all.

    Raises:
        StorageError: the storage does not respond; the run must not go back because of that.
        NewerFormatError: a checkpoint was written by a newer dist_ft.
        CheckpointError: all checkpoints are damaged. Only the owner of the run can decide to start
            again.
    """
    check = check or (lambda manifest: verify_checksums(store, manifest, world))

    # Listed by one rank: two listings may differ, and then ranks would check different checkpoints
    # and wait for each other.
    names = on_rank0(world, collectives, lambda: list_committed(store))
    if upto in names:
        names = names[names.index(upto) :]
    elif upto:
        last_key = sort_key(upto)
        names = [name for name in names if sort_key(name) <= last_key]

    first_problem = ""
    for name in names:
        manifest, problem = check_on_all_ranks(store, name, world, collectives, check)
        if not problem:
            # A skipped checkpoint has been logged with the reason; the latest may have vanished.
            if name == names[0]:
                on_rank0(world, collectives, partial(_warn_of_lost_checkpoint, store, name))
            return manifest

        if world.rank == 0:
            log.warning("checkpoint %s is skipped: %s", name, problem)
        first_problem = first_problem or problem

    # Not None, which means a new run: its first save would remove what could still be repaired.
    if names:
        raise CheckpointError(
            f"{store.redacted_url(FOLDER)}: none of the {len(names)} committed checkpoints can be "
            f"loaded (the latest: {first_problem}). Restore one from a copy, or move the folder "
            "away to start again."
        )
    return None


def check_on_all_ranks(
    store: Store,
    name: str,
    world: World,
    collectives: Collectives,
    check: Callable[[Manifest], None],
    tier: Tier = Tier.STORAGE,
) -> CheckResult:
    """Load the manifest of checkpoint `name` and call `check` on all ranks. A collective call.

    An error of `check` other than DamagedError is raised on all ranks.
    """
    try:
        # Raised on all ranks if rank 0 raises it, so all of them return here.
        manifest = on_rank0(world, collectives, lambda: load_manifest(store, name, tier))
    except DamagedError as error:
        return CheckResult(None, str(error))

    # Kept until all ranks have called `check`: raising at once would leave the others waiting.
    own_problem: DistFtError | None = None
    try:
        check(manifest)
    except DistFtError as error:
        own_problem = error

    # Another error than damage on any rank has priority: an earlier checkpoint may only be used if
    # this one is known to be bad.
    problems = [error for error in collectives.all_gather(own_problem) if error is not None]
    for problem in problems:
        if not isinstance(problem, DamagedError):
            raise problem

    first_problem = ""
    if problems:
        first_problem = str(problems[0])
    return CheckResult(manifest, first_problem)


def list_committed(store: Store, tier: Tier = Tier.STORAGE) -> list[str]:
    """Return the names of all checkpoints of `tier` that have a manifest, latest first."""
    names = [name for name in store.list(tier.value) if manifests.parse_folder(name)]
    names.sort(key=sort_key, reverse=True)
    names = [name for name in names if store.exists(_manifest_path(name, tier))]
    return _latest_history_first(store, names, tier)


def _latest_history_first(store: Store, names: list[str], tier: Tier) -> list[str]:
    """Return sorted names of checkpoints, with those first that continue one of a later attempt.

    Version 0.1.0 numbered attempts from 1 again when a run had lost its folder of attempts, so that
    a later checkpoint may carry a lower number. Its ledger shows it: it names a segment that a
    later attempt wrote, which a checkpoint of an older attempt cannot.
    """
    keys = {name: sort_key(name) for name in names}
    for name in _out_of_order(names):
        try:
            manifest = load_manifest(store, name, tier)
        except CheckpointError:
            continue  # whoever loads it reports why it cannot be read

        attempt = max(keys[name].attempt, _last_writer(manifest))
        keys[name] = CheckpointOrder(attempt, keys[name].step)
    return sorted(names, key=lambda name: keys[name], reverse=True)


def _out_of_order(names: list[str]) -> list[str]:
    """Return the checkpoints of a later step than some checkpoint of a later attempt.

    Args:
        names: sorted, latest first.
    """
    # Usually there are none, and no manifest has to be read.
    found = []
    first_step = math.inf  # of the attempts after the one at hand
    first_step_of_attempt = math.inf
    attempt = -1
    for name in names:
        key = sort_key(name)
        if key.attempt != attempt:
            first_step = min(first_step, first_step_of_attempt)
            first_step_of_attempt = math.inf
            attempt = key.attempt

        if key.step > first_step:
            found.append(name)
        first_step_of_attempt = min(first_step_of_attempt, key.step)
    return found


def _last_writer(manifest: Manifest) -> int:
    """Return the highest attempt that wrote a segment of the checkpoint's history."""
    paths = [segment.file.path for segment in manifest.ledger]
    return max(
        (attempts.number_in_name(attempts.LEDGER, path.rpartition("/")[2]) for path in paths),
        default=0,
    )


def _warn_of_lost_checkpoint(store: Store, name: str) -> None:
    """Log it if a later checkpoint than `name`, the latest there is, was committed."""
    lost_step = attempts.committed_step(store, sort_key(name).attempt)
    if lost_step > sort_key(name).step:
        log.warning(
            "the checkpoint of step %d was committed and is missing; the latest there is, of step "
            "%d, is used",
            lost_step,
            sort_key(name).step,
        )


def require_not_emptied(store: Store) -> None:
    """Raise CheckpointError if a run without any checkpoint had one (rank 0 only).

    It must not start over by itself.
    """
    step = attempts.committed_step(store)
    if step:
        raise CheckpointError(
            f"{store.redacted_url(FOLDER)}: holds no checkpoint, but one of step {step} was "
            "committed. Restore the folder from a copy, or move the run's folder away to start "
            "again."
        )


def sort_key(name: str) -> CheckpointOrder:
    """Return the key that orders checkpoints by age."""
    # Attempt before step: should an old attempt still commit a later step, its history is not the
    # one that the newer attempt continued.
    step, attempt = manifests.parse_folder(name) or (0, 0)
    return CheckpointOrder(attempt, step)


def load_manifest(store: Store, name: str, tier: Tier = Tier.STORAGE) -> Manifest:
    """Return the manifest of checkpoint `name`.

    Raises:
        DamagedError: the manifest is missing or damaged, or belongs to another checkpoint.
    """
    path = _manifest_path(name, tier)
    try:
        content = store.read_at_most(path, MAX_LARGE_BYTES)
    except StorageError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise DamagedError(f"{store.redacted_url(path)}: the file is missing") from error
        if isinstance(error.__cause__, UnusableFileError | IsADirectoryError):
            raise DamagedError(f"{error} It will not be loaded") from error
        raise

    manifest = manifests.parse_manifest(content, store.redacted_url(path))
    if manifest.folder_name != name:
        raise DamagedError(
            f"{store.redacted_url(path)}: is the manifest of {manifest.folder_name}; a checkpoint "
            "must not be copied or renamed; it will not be loaded"
        )
    return manifest


def _manifest_path(name: str, tier: Tier) -> str:
    return f"{tier.value}/{name}/{manifests.NAME}"


def require_complete(store: Store, manifest: Manifest) -> None:
    """Raise DamagedError if a file is missing or has the wrong length.

    Folders are listed, no file is read.
    """
    own_files = [item for item in manifest.files if not item.shared]
    require_files(checkpoint_store(store, manifest), own_files)
    require_shared_files(store, manifest)


def require_shared_files(store: Store, manifest: Manifest) -> None:
    """Raise DamagedError if a shared file is missing or has the wrong length."""
    shared = [item for item in manifest.files if item.shared]
    if shared:
        require_files(store.child(FROZEN), shared)


def require_files(folder: Store, files: Iterable[FileEntry]) -> None:
    """Raise DamagedError if one of `files` is missing in `folder` or has the wrong length."""
    # One listing rather than one request per file.
    sizes = folder.sizes()

    for item in files:
        if item.path not in sizes:
            raise DamagedError(f"{folder.redacted_url(item.path)}: the file is missing")

        if sizes[item.path] != item.num_bytes:
            raise DamagedError(
                f"{folder.redacted_url(item.path)}: has {sizes[item.path]} bytes, but "
                f"{item.num_bytes} according to the manifest"
            )


def verify_checksums(store: Store, manifest: Manifest, world: World) -> None:
    """Verify length and checksum of this rank's share of the files.

    Raises DamagedError if they differ.
    """
    require_complete(store, manifest)
    files = _checked_files(store, manifest)

    # In windows, so that a file of any size is read with a few buffers.
    ranges = []
    for index in world.share(len(manifest.files)):
        item = manifest.files[index]
        window_bytes = files.window_bytes(item.path, MAX_REQUEST_BYTES)
        for start in range(0, item.num_bytes, window_bytes):
            stop = min(item.num_bytes, start + window_bytes)
            ranges.append(ByteRange(item.path, start, stop))

    # Reading verifies; the bytes are not needed.
    for _ in files.read_all(ranges):
        pass


def _checked_files(store: Store, manifest: Manifest) -> CheckedFiles:
    return CheckedFiles(checkpoint_store(store, manifest), manifest.files, store.child(FROZEN))


def checkpoint_store(store: Store, manifest: Manifest) -> Store:
    """Return the folder of a checkpoint of the run at `store`."""
    return store.child(f"{FOLDER}/{manifest.folder_name}")


def open_reader(store: Store, manifest: Manifest) -> FragmentReader:
    """Return a reader of the checkpoint's fragments."""
    return FragmentReader(_checked_files(store, manifest))


def open_reader_together(
    store: Store, manifest: Manifest, world: World, collectives: Collectives
) -> FragmentReader:
    """Return a reader of the checkpoint's fragments.

    Each rank reads a share of the headers. A collective call.
    """
    files = _checked_files(store, manifest)
    return FragmentReader(files, gather_index(files, world, collectives))
