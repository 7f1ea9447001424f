"""The only door to fsspec: files, object stores and memory behind one small `Store`.

Guarantees: `write` is atomic (a reader sees the old bytes, the new bytes or nothing), transient failures are retried
with jitter, and every failure becomes one `StorageError` that names the URL without credentials. Does not cache.
"""

from __future__ import annotations

import os
import posixpath
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from threading import Lock
from typing import Any

from dist_ft.core.errors import StorageError
from dist_ft.core.logs import redact
from dist_ft.storage import listing, local_files
from dist_ft.storage.error_messages import explain, s3_code
from dist_ft.storage.retry import max_attempts, with_retries

_DEFAULTS: dict[str, dict[str, Any]] = {  # the client's own tries would multiply with ours
    "s3": {
        "config_kwargs": {
            "retries": {"total_max_attempts": 1},
            "connect_timeout": 10,
            "read_timeout": 60,
        }
    }
}
_filesystems: dict[tuple[int, str], Any] = {}
_lock = Lock()
_VERSIONS = (
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


def configure(options: Mapping[str, Mapping[str, Any]]) -> None:
    """Set fsspec options by protocol for this process (`storage.options` of the config)."""
    import fsspec.config

    for protocol, values in options.items():
        fsspec.config.conf.setdefault(protocol, {}).update(values)
    forget()


def forget() -> None:
    """Connect anew at the next call: options or credentials may have changed."""
    with _lock:
        _filesystems.clear()


def warm(url: str) -> None:
    """Import what a URL of this kind needs; nothing is contacted."""
    import fsspec

    fsspec.get_filesystem_class("file" if is_local(url) else url.split("://", 1)[0])


def is_local(url: str) -> bool:
    """Tell whether `url` lies on a disk of this machine (or one mounted here)."""
    return "://" not in url or url.startswith(("file://", "local://"))


def local_path(url: str) -> str:
    """Return the path of a local `url`, `~` being the home folder."""
    return os.path.expanduser(url.split("://", 1)[1] if "://" in url else url)


class Store:
    """A folder at an fsspec URL; all paths are relative to it, with '/' between parts."""

    def __init__(self, url: str) -> None:
        """Assign only: nothing is contacted before the first call."""
        self.url = os.path.abspath(local_path(url)) if is_local(url) else url.rstrip("/")

    def __repr__(self) -> str:
        return f"Store({redact(self.url)!r})"

    def child(self, path: str) -> Store:
        """Return the store of a sub-folder."""
        return Store(self.full(path))

    def full(self, path: str = "") -> str:
        """Return the whole URL of `path`."""
        return f"{self.url}/{path}" if path else self.url

    def shown(self, path: str = "") -> str:
        """Return the whole URL of `path` without credentials: what errors and logs may say."""
        return redact(self.full(path))

    def read(self, path: str, start: int | None = None, stop: int | None = None) -> bytes:
        """Return the bytes [start, stop) of a file, or all of them; fewer bytes than asked for are an error."""
        return self._call(
            "read",
            path,
            lambda fs, full: _whole(fs.cat_file(full, start=start, end=stop), start, stop),
        )

    def read_into(self, path: str, start: int, memory: memoryview) -> memoryview:
        """Return as many bytes of a file as `memory` is long, from `start` on; from a local disk, in that memory."""
        stop = start + len(memory)
        if not is_local(self.url):
            return memoryview(self.read(path, start, stop))
        return self._call(
            "read",
            path,
            lambda fs, full: _whole(local_files.read_into(full, start, memory), start, stop),
        )

    def write(self, path: str, content: bytes | memoryview | Sequence[memoryview]) -> None:
        """Write a file, given in parts or not, whole or not at all; on a local disk it is on the platter then."""
        if is_local(self.url):
            return self._call("write", path, lambda fs, full: local_files.write_file(full, content))
        whole = bytes(content) if isinstance(content, bytes | memoryview) else b"".join(content)
        return self._call("write", path, lambda fs, full: fs.pipe_file(full, whole))

    def create(self, path: str, content: bytes) -> bool:
        """Write a file only if it does not exist; return whether it was this call that made it."""
        try:
            if is_local(self.url):
                self._call("write", path, lambda fs, full: local_files.create_file(full, content))
            else:
                self._call(
                    "write", path, lambda fs, full: fs.pipe_file(full, content, mode="create")
                )
        except StorageError as error:
            if isinstance(error.__cause__, FileExistsError):
                return False
            raise
        return True

    def download(self, folder: str, wanted: Callable[[str], bool] = lambda name: True) -> list[str]:
        """Copy the files below this store whose paths are `wanted` into a local folder; return their paths.

        Raises StorageError for a path that leads out of the folder: object stores allow "../" in names.
        """
        names = [name for name in self.walk() if wanted(name)]
        for name in names:
            if name.startswith("/") or "\\" in name or ".." in name.split("/"):
                raise StorageError(
                    f"{self.shown(name)}: the name leads out of the folder it would be copied to; plain "
                    "relative names are allowed; remove that file"
                )
            target = os.path.join(folder, name)
            os.makedirs(os.path.dirname(target), exist_ok=True)
            self._get(name, target)
        return names

    def _get(self, path: str, local: str) -> None:
        self._call("read", path, lambda fs, full: fs.get_file(full, local))

    def sizes(self, path: str = "") -> dict[str, int]:
        """Return the length in bytes of every file below a folder, by its path relative to that folder; one listing."""
        return self._call("list", path, lambda fs, full: _sizes(fs, full))

    def about(self, path: str = "") -> dict[str, dict[str, Any]]:
        """Return {size, version} of every file below a folder, by its path relative to that folder; one listing."""
        return self._call(
            "list",
            path,
            lambda fs, full: {name: _about(info) for name, info in _below(fs, full).items()},
        )

    def exists(self, path: str = "") -> bool:
        """Tell whether a file or folder is there."""
        return bool(self._call("read", path, listing.exists))

    def walk(self, path: str = "") -> list[str]:
        """Return the sorted paths of all files below a folder, relative to this store."""
        return sorted(posixpath.join(path, name) if path else name for name in self.sizes(path))

    def list(self, path: str = "") -> list[str]:
        """Return the sorted names in a folder; an absent folder has none."""
        return self._call("list", path, listing.names)

    def remove(self, path: str) -> None:
        """Remove a file or a folder; an absent one is no error."""
        self._call("remove", path, _remove)

    def _call(self, verb: str, path: str, action: Callable[[Any, str], Any]) -> Any:
        return _attempt(verb, self.full(path), action)


def _whole(content: Any, start: int | None, stop: int | None) -> Any:
    """Return `content`, all of the bytes [start, stop) of a file; OSError if some are missing."""
    if stop is not None and len(content) != stop - (start or 0):
        raise OSError(
            f"{len(content)} bytes came, {stop - (start or 0)} were asked for from {start or 0}"
        )
    return content


def _attempt(verb: str, url: str, action: Callable[[Any, str], Any]) -> Any:
    """Return `action(filesystem, path)` of `url`, tried again while that can help; raises StorageError."""
    try:
        return with_retries(url, lambda: action(*filesystem(url)), can_hang=not is_local(url))
    except Exception as error:
        what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        what += f"; S3 says {s3_code(error)}" if s3_code(error) else ""
        raise StorageError(
            redact(f"{url}: can not {verb} it ({what}); {explain(error, max_attempts())}")
        ) from error


def filesystem(url: str) -> tuple[Any, str]:
    """Return the fsspec filesystem of `url` and the path within it. Listings are not cached.

    All threads share one for a bucket or host: fsspec makes one a thread, and each begins with a session of its own.
    """
    from fsspec.core import url_to_fs

    if is_local(url) or "::" in url:
        return url_to_fs(local_path(url) if is_local(url) else url)
    place = os.getpid(), "/".join(url.split("/")[:3])
    with _lock:
        fs = _filesystems.get(place)
        if fs is None:
            fs = _filesystems[place] = _connect(url)
    return fs, fs._strip_protocol(url)


def _connect(url: str) -> Any:
    import fsspec.config
    from fsspec.core import url_to_fs

    protocol = url.split("://", 1)[0]
    chosen = fsspec.config.conf.get(protocol, {})
    defaults = {
        name: value for name, value in _DEFAULTS.get(protocol, {}).items() if name not in chosen
    }
    fs, _ = url_to_fs(url, use_listings_cache=False, **defaults)
    if protocol in ("s3", "s3a"):
        fs.retries = 1  # as for _DEFAULTS
    return fs


def glob(url: str) -> dict[str, dict[str, Any]]:
    """Return {URL: {size, version}} of the files that match `url` (a file, a glob, or a folder: all below), sorted.

    What the listing tells is enough: no file is asked for by itself. `version` changes when a file's content may have.
    """

    def find(fs: Any, path: str) -> dict[str, dict[str, Any]]:
        return {
            name if is_local(url) else fs.unstrip_protocol(name): _about(info)
            for name, info in listing.matching(fs, path).items()
        }

    return _attempt("list", url, find)


def stat(url: str) -> dict[str, Any]:
    """Return {size, version} of a file; see `glob`."""
    return _attempt("read", url, lambda fs, path: _about(fs.info(path)))


def _about(info: Mapping[str, Any]) -> dict[str, Any]:
    version = next((info[key] for key in _VERSIONS if info.get(key)), None)
    told = str(
        version.timestamp() if isinstance(version, datetime) else version
    )  # listings tell it as a number
    return {"size": int(info["size"] or 0), "version": told}


def arrow_filesystem(url: str) -> tuple[Any, str]:
    """Return a pyarrow filesystem over the same fsspec one (for Ray Train and Parquet), and the path within it."""
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    fs, path = filesystem(url)
    if not is_local(url):
        fs = _connect(
            url
        )  # Ray compares filesystems, and fsspec's are the same within one thread only
    return PyFileSystem(FSSpecHandler(fs)), path


def _sizes(fs: Any, path: str) -> dict[str, int]:
    return {name: int(info["size"] or 0) for name, info in _below(fs, path).items()}


def _below(fs: Any, path: str) -> dict[str, Any]:
    root = path.rstrip("/") + "/"
    return {
        name[len(root) :]: info
        for name, info in listing.below(fs, path).items()
        if name.startswith(root)
    }


def _remove(fs: Any, path: str) -> None:
    if listing.exists(fs, path):
        fs.rm(path, recursive=True)
