"""Files on a disk of this machine: written atomically, and synced to disk when the call returns."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, BinaryIO
from uuid import uuid4

if TYPE_CHECKING:
    from filelock import FileLock

HIDDEN = ".tmp-"
"""Prefix of files that are being written."""
_NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


def file_lock(path: str) -> FileLock:
    """Return the lock file `path`, which is not held yet.

    Whoever may write to its folder may also hold the lock: users of a shared cache wait for each
    other.
    """
    from filelock import FileLock

    mode = 0o600
    folder_mode = os.stat(os.path.dirname(path)).st_mode
    if folder_mode & stat.S_IWGRP:
        mode |= 0o060
    if folder_mode & stat.S_IWOTH:
        mode |= 0o006
    return FileLock(path, mode=mode)


@contextlib.contextmanager
def locked(path: str) -> Iterator[None]:
    """Hold the lock file `path`; does nothing in a folder that this user cannot write to."""
    # A shared cache may be read-only. Nothing in it can change, or whoever changes it waits for
    # nobody here anyway.
    if not os.access(os.path.dirname(path), os.W_OK):
        yield
        return
    with file_lock(path):
        yield


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
    os.makedirs(folder, exist_ok=True)
    # A unique name: processes of an old and a new attempt may write the same path at the same time.
    temporary = os.path.join(folder, f"{HIDDEN}{name}-{uuid4().hex[:8]}")
    try:
        # Synced before it is published: after a power loss some file systems have the new name but
        # not yet the bytes.
        with open(temporary, "xb") as file:
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
