"""Listings of an fsspec filesystem that raise an error when a folder cannot be listed.

fsspec's own `glob` takes such a folder for an empty one: data would be missing without an error.

Guarantees: an absent path is empty; every other failure is raised. Does not retry (`filesystem`
does).
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Mapping
from datetime import datetime
from fnmatch import fnmatchcase
from typing import Any, TypedDict

from dist_ft.storage import local_files

# Fields of fsspec's file info, of which the first that exists is the version of a file.
_VERSION_FIELDS = (
    "ETag",
    "etag",
    "md5Hash",
    "content_md5",
    "blob_id",
    "mtime",
    "LastModified",
    "last_modified",
    "created",
)


class FileInfo(TypedDict):
    """Metadata of a file in a listing.

    Attributes:
        size: size in bytes.
        version: changes whenever the content may have changed.
    """

    size: int
    version: str


Infos = dict[str, dict[str, Any]]
"""{path within the filesystem: fsspec's info}"""


def exists(fs: Any, path: str) -> bool:
    """Whether a file or folder exists."""
    try:
        fs.info(path)
    except FileNotFoundError:
        return False
    return True


def names(fs: Any, path: str) -> list[str]:
    """Return the sorted names in a folder."""
    paths = _visible(_entries(fs, path))
    return sorted(posixpath.basename(name) for name in paths)


def below(fs: Any, path: str) -> Infos:
    """Return all files below a folder, or the file itself, in one listing where possible."""
    try:
        if _lists_recursively(fs):
            infos = fs.find(path, detail=True)
        else:
            infos = _walk(fs, path, fs.info(path))
    except FileNotFoundError:
        return {}

    return {name: infos[name] for name in _visible(infos)}


def _lists_recursively(fs: Any) -> bool:
    """Whether the store lists recursively by itself; fsspec's fallback skips folders that fail."""
    # Filesystems with a recursive listing of their own override fsspec's generic `_find`.
    method = getattr(type(fs), "_find", None)
    return method is not None and method.__module__ != "fsspec.asyn"


def _walk(fs: Any, path: str, info: dict[str, Any]) -> Infos:
    if info["type"] != "directory":
        return {path: info}

    infos: Infos = {}
    for entry, entry_info in _entries(fs, path).items():
        infos |= _walk(fs, entry, entry_info)
    return infos


def matching(fs: Any, path: str) -> Infos:
    """Return the files that match a pattern, or, without pattern or match, those below the path."""
    matches: Infos = {}
    if is_pattern(path):
        matches = _files(_match_pattern(fs, path))

    # A name may have wildcard characters itself, such as part[1].jsonl.
    return matches or _files(below(fs, path))


def is_pattern(path: str) -> bool:
    """Whether `path` has wildcards."""
    return any(char in path for char in "*?[")


def _match_pattern(fs: Any, path: str) -> Infos:
    """Return what matches a pattern.

    Lists the folder before the first wildcard, then each folder that a later component matches.
    """
    components = path.rstrip("/").split("/")
    first = 0
    while not is_pattern(components[first]):
        first += 1
    root = "/".join(components[:first])

    if "**" in path:
        # Any depth may match, so one recursive listing costs least.
        return {name: info for name, info in below(fs, root).items() if matches(name, path)}

    infos: Infos = {root: {"type": "directory"}}
    for component in components[first:]:
        # Files matched so far cannot match a longer path.
        folders = [name for name, info in infos.items() if info["type"] == "directory"]
        infos = {}
        for folder in folders:
            for name, info in _entries(fs, folder).items():
                if fnmatchcase(posixpath.basename(name), component):
                    infos[name] = info

    return infos


def matches(name: str, pattern: str) -> bool:
    """Whether a path matches a pattern in which `**` stands for any number of folders."""
    return _components_match(name.split("/"), pattern.split("/"))


def _components_match(components: list[str], patterns: list[str]) -> bool:
    if not patterns:
        return not components

    if patterns[0] == "**":
        # At the end of a pattern it stands for any file, so one component must be left for "*".
        remaining = patterns[1:] or ["*"]
        for num_skipped in range(len(components)):
            if _components_match(components[num_skipped:], remaining):
                return True
        return False

    if not components or not fnmatchcase(components[0], patterns[0]):
        return False

    return _components_match(components[1:], patterns[1:])


def _entries(fs: Any, folder: str) -> Infos:
    """Return the entries of a folder, without those of its subfolders."""
    try:
        entries = fs.ls(folder or "/", detail=True)
    except (FileNotFoundError, NotADirectoryError):
        return {}

    infos: Infos = {}
    for info in entries:
        name = info["name"].rstrip("/")
        # The listing of a file is the file itself, and object stores may list the empty object that
        # marks a folder.
        if name != folder.rstrip("/"):
            infos[name] = info
    return infos


def _files(infos: Infos) -> Infos:
    files: Infos = {}
    for name in sorted(_visible(infos)):
        if infos[name]["type"] != "directory":
            files[name] = infos[name]
    return files


def is_visible(name: str) -> bool:
    """Whether a file of this name is not one that is still being written."""
    return not name.startswith(local_files.HIDDEN)


def _visible(paths: Iterable[str]) -> list[str]:
    """Return `paths` without files that are still being written."""
    return [path for path in paths if is_visible(posixpath.basename(path))]


def file_info(info: Mapping[str, Any]) -> FileInfo:
    """Return size and version of a file, given fsspec's info."""
    version = next((info[field] for field in _VERSION_FIELDS if info.get(field)), None)
    # Of one store, some calls give the time as a number and others as a datetime.
    if isinstance(version, datetime):
        version = version.timestamp()
    return {"size": int(info["size"] or 0), "version": str(version)}


def sizes(fs: Any, path: str) -> dict[str, int]:
    """Return {path relative to the folder: bytes} of the files below a folder."""
    return {name: int(info["size"] or 0) for name, info in _relative(fs, path).items()}


def file_infos(fs: Any, path: str) -> dict[str, FileInfo]:
    """Return {path relative to the folder: info} of the files below a folder."""
    return {name: file_info(info) for name, info in _relative(fs, path).items()}


def _relative(fs: Any, path: str) -> Infos:
    """Return the files below a folder, by path relative to it."""
    root = path.rstrip("/") + "/"
    infos: Infos = {}
    for name, info in below(fs, path).items():
        # If `path` is a file, the listing is that file, which is not below anything.
        if name.startswith(root):
            infos[name[len(root) :]] = info
    return infos
