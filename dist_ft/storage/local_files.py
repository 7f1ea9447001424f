"""Files on a disk of this machine.

Written atomically, and synced to disk when the call returns. A file that is being written has a
temporary name and is locked. The lock ends with the process that holds it, so temporary files of
killed processes can be distinguished from those of live ones.

Only regular files are read: opening a named pipe would wait for a writer forever, and a device may
have no end.
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
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, BinaryIO
from uuid import uuid4

from dist_ft.core import fault_injection
from dist_ft.storage.error_messages import UnusableFileError

if TYPE_CHECKING:
    from filelock import FileLock

HIDDEN = ".tmp-"
"""Prefix of files that are being written."""
_KINDS = (
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
FOREIGN_AGE_S = 3600.0
"""Temporary files of other machines count as left behind once they are this old: not every network
file system shows one machine the locks of another."""
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


def require_regular(path: str) -> None:
    """Raise UnusableFileError if `path` is a pipe, socket or device; OSError if it is absent."""
    _require_regular(os.stat(path).st_mode)


def _require_regular(mode: int) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))

    for is_kind, name in _KINDS:
        if is_kind(mode):
            raise UnusableFileError(f"is {name}, not a regular file")


def require_regular_files(folder: str) -> None:
    """Raise UnusableFileError if a folder, such as that of a model, holds a pipe or a device.

    For folders that a library reads, which would wait for it forever.
    """
    for parent, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(parent, name)
            try:
                require_regular(path)
            except UnusableFileError as error:
                raise UnusableFileError(f"{os.path.relpath(path, folder)} {error}") from error
            except OSError:
                continue  # a broken link: the library names it if it needs it


def open_regular(path: str | os.PathLike[str], buffering: int = -1) -> BinaryIO:
    """Open a regular file for reading.

    Raises:
        OSError: it is absent, a folder, or (UnusableFileError) a pipe, socket or device.
    """
    # Without waiting for the writer of a pipe. The check is on what was opened: a check before
    # could see another file than the call after it.
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        # A socket cannot be opened at all.
        if error.errno in (errno.ENXIO, errno.EOPNOTSUPP):
            raise UnusableFileError("is a socket or device, not a regular file") from error
        raise

    try:
        _require_regular(os.fstat(descriptor).st_mode)
        return os.fdopen(descriptor, "rb", buffering)
    except BaseException:
        os.close(descriptor)
        raise


def read_regular(path: str | os.PathLike[str], max_bytes: int | None = None) -> bytes:
    """Return the content of a regular file.

    Raises:
        OSError: see `open_regular`; UnusableFileError also for a file of more than `max_bytes`.
    """
    with open_regular(path) as file:
        if max_bytes is not None:
            # Before it is read; files of /proc report no size, and are checked afterwards.
            _require_size(_size(file), max_bytes)
        content = file.read()

    if max_bytes is not None:
        _require_size(len(content), max_bytes)
    return content


def _size(file: BinaryIO) -> int:
    return os.fstat(file.fileno()).st_size


def _require_size(num_bytes: int, max_bytes: int) -> None:
    if num_bytes > max_bytes:
        raise UnusableFileError(f"is larger than {max_bytes / 2**20:g} MiB")


def require_size(content: bytes, max_bytes: int) -> bytes:
    """Return `content`; raises UnusableFileError if it is larger than `max_bytes`."""
    _require_size(len(content), max_bytes)
    return content


def read_range(path: str, start: int | None, stop: int | None) -> bytes:
    """Return the bytes [start, stop) of a regular file, or as many as it has."""
    with open_regular(path) as file:
        start = start or 0
        file.seek(start)
        if stop is None:
            return file.read()

        # Not more than there is: a damaged manifest may name any number, and memory for all of it
        # would be allocated first.
        return file.read(max(0, min(stop, _size(file)) - start))


def read_into(path: str, start: int, memory: memoryview) -> memoryview:
    """Fill `memory` with the bytes of a file from `start` on; return the part that was filled."""
    # Unbuffered, since a buffer would copy every byte once more. One call may read less than fits
    # (Linux: at most 2 GiB), so read until nothing comes.
    num_read = 0
    with open_regular(path, buffering=0) as file:
        file.seek(start)
        while num_read < len(memory) and (count := file.readinto(memory[num_read:])):  # type: ignore[attr-defined]
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
            fault_injection.hit("storage.before_publish")
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
