"""Files on a disk of this machine: written whole or not at all, and on the platter when the call returns."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from typing import BinaryIO
from uuid import uuid4

HIDDEN = ".tmp-"
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


def write_file(path: str, content: bytes | memoryview | Sequence[memoryview]) -> None:
    """Write beside the target, force it to disk, rename over it."""
    _by_way_of(path, content, os.replace)


def read_into(path: str, start: int, memory: memoryview) -> memoryview:
    """Fill `memory` with the bytes of a file from `start` on; return the part of it that the file reaches."""
    done = 0
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        while done < len(memory) and (count := file.readinto(memory[done:])):
            done += count
    return memory[:done]


def create_file(path: str, content: bytes) -> None:
    """As `write_file`, but a file that is already there is an error (a hard link can not overwrite).

    Where there are no hard links (FUSE, FAT) still one caller alone makes the file, but others may see a part of it.
    """
    try:
        _by_way_of(path, content, os.link)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        _exclusively(path, content)


def _exclusively(path: str, content: bytes) -> None:
    """Make `path` and write it; FileExistsError if it is there."""
    with open(path, "xb") as file:
        try:
            _to_disk(file, content)
        except BaseException:
            os.remove(path)
            raise


def _to_disk(file: BinaryIO, content: bytes | memoryview | Sequence[memoryview]) -> None:
    for part in [content] if isinstance(content, bytes | memoryview) else content:
        file.write(part)
    file.flush()
    os.fsync(file.fileno())


def _by_way_of(
    path: str, content: bytes | memoryview | Sequence[memoryview], place: Callable[[str, str], None]
) -> None:
    """Write a hidden file beside `path`, force it to disk, `place` it, force the folder's entry to disk."""
    folder, name = os.path.split(path)
    os.makedirs(folder, exist_ok=True)
    temporary = os.path.join(folder, f"{HIDDEN}{name}-{uuid4().hex[:8]}")
    try:
        with open(temporary, "xb") as file:
            _to_disk(file, content)
        place(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)
    entry = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(entry)
    finally:
        os.close(entry)
