"""Files on a disk of this machine: written atomically, and synced to disk when the call returns.

A file that is being written has a temporary name and is locked. The lock ends with the process that
holds it, so temporary files of killed processes can be distinguished from those of live ones.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import socket
import stat
import time
from collections.abc import Callable, Sequence
from typing import BinaryIO
from uuid import uuid4

HIDDEN = ".tmp-"
"""Prefix of files that are being written."""
FOREIGN_AGE_S = 3600.0
"""Temporary files of other machines count as left behind once they are this old: not every network
file system shows one machine the locks of another."""
_NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


def write_file(path: str, content: bytes | memoryview | Sequence[memoryview]) -> None:
    """Write a temporary file next to `path`, sync it, and rename it over `path`."""
    _write_then(os.replace, path, content)


def read_into(path: str, start: int, memory: memoryview) -> memoryview:
    """Fill `memory` with the bytes of a file from `start` on; return the part that was filled."""
    # Unbuffered, since a buffer would copy every byte once more. One call may read less than fits
    # (Linux: at most 2 GiB), so read until nothing comes.
    num_read = 0
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        while num_read < len(memory) and (count := file.readinto(memory[num_read:])):
            num_read += count
    return memory[:num_read]


def create_file(path: str, content: bytes) -> None:
    """As `write_file`, but raise FileExistsError if `path` exists (a hard link cannot overwrite).

    Without hard links (FUSE, FAT) still only one caller creates the file, but others may see a part
    of it.
    """
    try:
        _write_then(os.link, path, content)
    except OSError as error:
        # FileExistsError passes through too: it is the result that callers look for.
        if error.errno not in _NO_HARD_LINKS:
            raise
        _create_exclusively(path, content)


def _create_exclusively(path: str, content: bytes) -> None:
    """Create `path` and write it; FileExistsError if it exists."""
    with open(path, "xb") as file:
        try:
            _write_and_sync(file, content)
        except BaseException:
            # Otherwise nobody could create the file again, and readers would find part of it.
            os.remove(path)
            raise


def _write_and_sync(file: BinaryIO, content: bytes | memoryview | Sequence[memoryview]) -> None:
    parts = [content] if isinstance(content, bytes | memoryview) else content
    for part in parts:
        file.write(part)

    # fsync writes what the kernel has, so Python's own buffer goes to the kernel first.
    file.flush()
    os.fsync(file.fileno())


def _write_then(
    publish: Callable[[str, str], None],
    path: str,
    content: bytes | memoryview | Sequence[memoryview],
) -> None:
    """Write a hidden file next to `path` and sync it; `publish(hidden, path)`; sync the folder."""
    folder, name = os.path.split(path)
    _make_folder(folder)
    with _open_temporary(folder, name) as file:
        # Until it is published the file stays locked, so that nobody removes it.
        temporary = file.name
        try:
            # Synced before it is published: after a power loss some file systems have the new name
            # but not yet the bytes.
            _write_and_sync(file, content)
            publish(temporary, path)
        finally:
            # A rename moved it, a hard link or an error left it.
            if os.path.exists(temporary):
                os.remove(temporary)

    # The new name is part of the folder, which has to be synced for itself.
    folder_descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(folder_descriptor)
    finally:
        os.close(folder_descriptor)


def _make_folder(folder: str) -> None:
    try:
        os.makedirs(folder, exist_ok=True)
    except FileExistsError as error:
        # Not to be mistaken for the file itself, whose existence is a result and no error.
        text = "a file is in the place of the folder"
        raise NotADirectoryError(errno.ENOTDIR, text, folder) from error


def _machine() -> str:
    """Return what names this machine in temporary files."""
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def _open_temporary(folder: str, name: str) -> BinaryIO:
    """Return a new temporary file in `folder` for the file `name`, locked."""
    while True:
        # Unique: processes of an old and a new attempt may write the same path at the same time.
        path = os.path.join(folder, f"{HIDDEN}{name}-{_machine()}-{uuid4().hex[:8]}")
        file = open(path, "xb")  # noqa: SIM115
        try:
            # `remove_leftovers` may have seen the file before it was locked.
            if _lock(file) and _is_at(file, path):
                return file
        except BaseException:
            file.close()
            raise
        file.close()


def _lock(file: BinaryIO) -> bool:
    """Lock a file until it is closed; return False if another process has locked it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        # Without locks on this file system `remove_leftovers` removes nothing.
        return True
    return True


def _is_at(file: BinaryIO, path: str) -> bool:
    """Whether `path` is still the name of an open file."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.lstat(path))
    except FileNotFoundError:
        return False


def remove_leftovers(folder: str) -> int:
    """Remove the temporary files below `folder` whose writers were killed; return their number."""
    num_removed = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            # Another process may do the same, or remove the folder.
            with contextlib.suppress(OSError):
                if name.startswith(HIDDEN) and _remove_leftover(parent, name):
                    num_removed += 1
    return num_removed


def _remove_leftover(folder: str, name: str) -> bool:
    """Remove a temporary file unless its writer may be alive; return whether it was removed.

    Raises OSError, also if the file is locked or its file system has no locks.
    """
    path = os.path.join(folder, name)
    status = os.lstat(path)
    if not stat.S_ISREG(status.st_mode):
        return False

    is_own = name.split("-")[-2] == _machine()
    if not is_own and time.time() - status.st_mtime < FOREIGN_AGE_S:
        return False

    descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    try:
        # Removed under the lock: a writer that creates the file just now finds it gone and creates
        # another one.
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.remove(path)
    finally:
        os.close(descriptor)
    return True
