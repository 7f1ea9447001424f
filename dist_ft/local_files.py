"""Files on a disk of this machine: written whole or not at all, and on the platter when the call returns."""

from __future__ import annotations

import os
from collections.abc import Callable
from uuid import uuid4

HIDDEN = ".tmp-"


def write_file(path: str, content: bytes | memoryview) -> None:
    """Write beside the target, force it to disk, rename over it."""
    _by_way_of(path, content, os.replace)


def create_file(path: str, content: bytes) -> None:
    """As `write_file`, but a file that is already there is an error (a hard link can not overwrite)."""
    _by_way_of(path, content, os.link)


def _by_way_of(path: str, content: bytes | memoryview, place: Callable[[str, str], None]) -> None:
    """Write a hidden file beside `path`, force it to disk, `place` it, force the folder's entry to disk."""
    folder, name = os.path.split(path)
    os.makedirs(folder, exist_ok=True)
    temporary = os.path.join(folder, f"{HIDDEN}{name}-{uuid4().hex[:8]}")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        place(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)
    entry = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(entry)
    finally:
        os.close(entry)
