"""Listings of an fsspec filesystem in which trouble is an error.

fsspec's own `glob` takes a folder that it can not list for an empty one: a store in trouble for a folder without data.

Guarantees: what is absent is empty, everything else that goes wrong is raised. Does not try again (`storage` does).
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

from dist_ft.storage import local_files

Found = dict[str, dict[str, Any]]
"""{path within the filesystem: fsspec's info}"""


def exists(fs: Any, path: str) -> bool:
    """Tell whether a file or folder is there."""
    try:
        fs.info(path)
    except FileNotFoundError:
        return False
    return True


def names(fs: Any, path: str) -> list[str]:
    """Return the sorted names in a folder."""
    return sorted(posixpath.basename(name) for name in _visible(_entries(fs, path)))


def below(fs: Any, path: str) -> Found:
    """Return all files below a folder, or the file itself: one flat listing where the store has such."""
    try:
        found = fs.find(path, detail=True) if _is_flat(fs) else _walked(fs, path, fs.info(path))
    except FileNotFoundError:
        return {}
    return {name: found[name] for name in _visible(found)}


def _is_flat(fs: Any) -> bool:
    """Tell whether the store lists all that is below by itself; fsspec's general way passes over folders in trouble."""
    own = getattr(type(fs), "_find", None)
    return own is not None and own.__module__ != "fsspec.asyn"


def _walked(fs: Any, path: str, info: dict[str, Any]) -> Found:
    if info["type"] != "directory":
        return {path: info}
    return {
        name: about
        for entry, known in _entries(fs, path).items()
        for name, about in _walked(fs, entry, known).items()
    }


def matching(fs: Any, path: str) -> Found:
    """Return the files that match a pattern, or those below the path where it is none or nothing matches."""
    return (_files(_by_pattern(fs, path)) if is_pattern(path) else {}) or _files(below(fs, path))


def is_pattern(path: str) -> bool:
    """Tell whether `path` may stand for several files."""
    return any(char in path for char in "*?[")


def _by_pattern(fs: Any, path: str) -> Found:
    """One listing for the folder before the first wildcard, then one for each folder that a further part leads into."""
    parts = path.rstrip("/").split("/")
    first = next(place for place, part in enumerate(parts) if is_pattern(part))
    root, rest = "/".join(parts[:first]), parts[first:]
    if "**" in path:
        return {name: info for name, info in below(fs, root).items() if _matches(name, path)}
    found: Found = {root: {"type": "directory"}}
    for part in rest:
        folders = [name for name, info in found.items() if info["type"] == "directory"]
        found = {
            name: info
            for folder in folders
            for name, info in _entries(fs, folder).items()
            if fnmatchcase(posixpath.basename(name), part)
        }
    return found


def _matches(name: str, pattern: str) -> bool:
    """Tell whether a path matches a pattern in which `**` stands for any number of folders."""
    return _parts_match(name.split("/"), pattern.split("/"))


def _parts_match(parts: list[str], patterns: list[str]) -> bool:
    if not patterns:
        return not parts
    if patterns[0] == "**":
        return any(
            _parts_match(parts[skipped:], patterns[1:] or ["*"]) for skipped in range(len(parts))
        )
    return (
        bool(parts) and fnmatchcase(parts[0], patterns[0]) and _parts_match(parts[1:], patterns[1:])
    )


def _entries(fs: Any, folder: str) -> Found:
    """Return what lies in a folder."""
    try:
        listed = fs.ls(folder or "/", detail=True)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    found = {info["name"].rstrip("/"): info for info in listed}
    return {name: info for name, info in found.items() if name != folder.rstrip("/")}


def _files(found: Found) -> Found:
    return {
        name: found[name] for name in sorted(_visible(found)) if found[name]["type"] != "directory"
    }


def _visible(paths: Iterable[str]) -> list[str]:
    """Return `paths` without those of files that are still being written."""
    return [path for path in paths if not posixpath.basename(path).startswith(local_files.HIDDEN)]
