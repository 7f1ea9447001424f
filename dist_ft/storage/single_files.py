"""Read and write one file by its path or URL, where no folder is at hand."""

from __future__ import annotations

from typing import NamedTuple

from dist_ft.storage.filesystem import Store


class FileLocation(NamedTuple):
    """The store of a file's folder, and the file's name in it."""

    store: Store
    name: str


def locate_file(path: str) -> FileLocation:
    """Return where a file is, given its path (relative, absolute) or URL."""
    folder, slash, name = path.rpartition("/")
    if not slash:
        folder = "."
    elif not folder:
        folder = "/"  # the path is that of a file in the root folder
    return FileLocation(Store(folder), name)


def read_file(path: str, max_bytes: int | None = None) -> bytes:
    """Return the content of a file.

    Raises:
        StorageError: it cannot be read, is not a regular file, or has more than `max_bytes`.
    """
    store, name = locate_file(path)
    if max_bytes is None:
        return store.read(name)
    return store.read_at_most(name, max_bytes)


def write_file(path: str, content: bytes) -> None:
    """Write a file, whole or not at all; its folder is created if needed."""
    store, name = locate_file(path)
    store.write(name, content)
