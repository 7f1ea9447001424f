"""Temporary folders; those that killed processes left behind are removed by later ones.

Each folder has a lock file, which its process holds. However that process ends, the kernel releases
the lock with it, and whoever creates the next temporary folder removes those that nobody holds.
Neither process ids nor ages decide: ids are reused, and each container that shares a disk has its
own. Uses only the standard library.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import logging
import os
import secrets
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from dist_ft.core.private_folders import user_folder

log = logging.getLogger("dist_ft.scratch")
LOCK_SUFFIX = ".lock"
HIDDEN = ".tmp-"
"""Prefix of temporary folders outside the system's temporary folder."""
NEW_FILE = ".tmp-"
"""Part of the names of files that are being written."""
KEPT = {"ray": 3}
"""How many of the latest leftovers of a purpose are kept: logs explain why their process ended."""
OTHER_BOOT_S = 86400.0
"""Age after which a folder made before this machine started, or on another machine, is removed."""


class NewFile(NamedTuple):
    """A file that is being written: its path, and the open file."""

    path: Path
    file: BinaryIO


class Scratch:
    """A temporary folder of this process.

    Attributes:
        path: the folder, which only this user can access.
    """

    def __init__(self, path: Path, lock: int | None = None) -> None:
        """Wrap an existing folder; `lock`: descriptor of its lock file. Use `create`."""
        self.path = path
        self._lock = lock

    def remove(self) -> None:
        """Remove the folder with all that is in it; errors are ignored, later processes retry."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock is None:
            return

        # The lock file last: with it, a folder that could not be removed is found again.
        if not self.path.exists():
            _lock_path(self.path).unlink(missing_ok=True)
        self.release()

    def release(self) -> None:
        """Leave the folder to later processes, which may remove it."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def create(purpose: str, temp: str | None = None) -> Scratch:
    """Create a temporary folder, and remove those of processes that have ended.

    Args:
        purpose: start of its name: lower-case letters.
        temp: the system's temporary folder; None: the one of TMPDIR.

    Raises:
        OSError: it cannot be created.
    """
    parent = user_folder(temp)
    if parent is None:
        # A random name and mode 0700, but nobody finds it again if this process is killed.
        log.warning(
            "%s/dist_ft-%d belongs to another user or is open to others: temporary files of "
            "killed processes are not removed. Remove it, or set TMPDIR to a folder of yours",
            temp or tempfile.gettempdir(),
            os.geteuid(),
        )
        return Scratch(Path(tempfile.mkdtemp(prefix=f"dist_ft-{purpose}-", dir=temp)))

    collect(parent)
    return _create(parent, f"{purpose}-")


def create_next_to(path: Path, purpose: str) -> Scratch:
    """As `create`, in the folder of `path`, so that its files can be renamed to `path`."""
    collect(path.parent, f"{HIDDEN}{purpose}-")

    # By boot, because a network disk need not know of the locks of other machines.
    return _create(path.parent, f"{HIDDEN}{purpose}-{_boot_id()}-")


@contextlib.contextmanager
def folder(purpose: str) -> Iterator[Path]:
    """Yield a temporary folder that is removed at the end; see `create`."""
    scratch = create(purpose)
    try:
        yield scratch.path
    finally:
        scratch.remove()


@contextlib.contextmanager
def folder_next_to(path: Path, purpose: str) -> Iterator[Path]:
    """Yield a temporary folder that is removed at the end; see `create_next_to`."""
    scratch = create_next_to(path, purpose)
    try:
        yield scratch.path
    finally:
        scratch.remove()


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[NewFile]:
    """Yield a file next to `path` to write to and rename; removed at the end if it still exists.

    Its name is that of `path` with `NEW_FILE` and random digits. If this process is killed,
    `remove_abandoned` removes it.
    """
    while True:
        temporary = path.with_name(f"{path.name}{NEW_FILE}{secrets.token_hex(4)}")
        descriptor = _create_locked(temporary)
        if descriptor is not None:
            break

    with os.fdopen(descriptor, "wb") as file:
        try:
            yield NewFile(temporary, file)
        finally:
            temporary.unlink(missing_ok=True)


def remove_abandoned(path: Path) -> None:
    """Remove a file of `new_file` if its process has ended."""
    descriptor = _lock_abandoned(path)
    if descriptor is not None:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def collect(parent: Path, prefix: str = "") -> None:
    """Remove temporary folders in `parent` whose processes have ended.

    Args:
        parent: the folder that they are in.
        prefix: start of their names.
    """
    abandoned: dict[str, list[Scratch]] = {}
    for lock_path in _lock_files(parent, prefix):
        scratch = _take_over(lock_path)
        if scratch is not None:
            purpose = lock_path.name.split("-")[0]
            abandoned.setdefault(purpose, []).append(scratch)

    for purpose, scratches in abandoned.items():
        num_kept = KEPT.get(purpose, 0)
        scratches.sort(key=_created_at_s, reverse=True)
        for scratch in scratches[:num_kept]:
            scratch.release()
        for scratch in scratches[num_kept:]:
            scratch.remove()


def _create(parent: Path, prefix: str) -> Scratch:
    scratch = _create_lock(parent, prefix)
    try:
        scratch.path.mkdir(mode=0o700)
    except OSError:
        scratch.remove()
        raise
    return scratch


def _lock_files(parent: Path, prefix: str) -> list[Path]:
    """Return the lock files in a folder whose temporary folders may be removed."""
    own_boot = _boot_id()
    found = []
    try:
        entries = list(os.scandir(parent))
    except OSError:
        return []

    for entry in entries:
        if not entry.name.endswith(LOCK_SUFFIX) or not entry.name.startswith(prefix):
            continue

        # Where the name has a boot, the disk may be shared by machines that do not see each other's
        # locks. Then only age tells whether the process has ended.
        is_from_elsewhere = entry.name.startswith(HIDDEN) and own_boot not in entry.name
        with contextlib.suppress(OSError):
            age_s = time.time() - entry.stat(follow_symlinks=False).st_mtime
            if not is_from_elsewhere or age_s > OTHER_BOOT_S:
                found.append(Path(entry.path))
    return found


def _take_over(lock_path: Path) -> Scratch | None:
    """Return the temporary folder of a lock file that no process holds, None if one does."""
    descriptor = _lock_abandoned(lock_path)
    if descriptor is None:
        return None
    return Scratch(lock_path.with_name(lock_path.name.removesuffix(LOCK_SUFFIX)), descriptor)


def _lock_abandoned(path: Path) -> int | None:
    """Return the descriptor of a file of this user that no process held and this one now does."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None

    with contextlib.suppress(OSError):
        status = os.fstat(descriptor)
        if status.st_uid == os.geteuid() and stat.S_ISREG(status.st_mode):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Another process may have removed it while this one opened it.
            if os.fstat(descriptor).st_nlink:
                return descriptor

    os.close(descriptor)
    return None


def _create_lock(parent: Path, prefix: str) -> Scratch:
    """Return a temporary folder that does not exist yet, with its lock held."""
    while True:
        path = parent / f"{prefix}{secrets.token_hex(4)}"
        descriptor = _create_locked(_lock_path(path))
        if descriptor is not None:
            return Scratch(path, descriptor)


def _create_locked(path: Path) -> int | None:
    """Return the descriptor of a new file that this process holds; None if another one took it."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    except FileExistsError:
        return None

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        # Between the two calls another process took it for an abandoned one.
        os.close(descriptor)
        return None
    except OSError as error:
        # A disk without locks: nobody else can lock it either, so only its process removes it.
        log.debug("%s cannot be locked (%s)", path, error)

    if os.fstat(descriptor).st_nlink:
        return descriptor
    os.close(descriptor)
    return None


def _lock_path(path: Path) -> Path:
    return path.with_name(path.name + LOCK_SUFFIX)


def _created_at_s(scratch: Scratch) -> float:
    try:
        return _lock_path(scratch.path).stat().st_mtime
    except OSError:
        return 0.0


@functools.cache
def _boot_id() -> str:
    """Return what names this start of this machine's kernel, as far as the system has it."""
    try:
        text = Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        text = socket.gethostname()
    return hashlib.sha256(text.encode()).hexdigest()[:8]
