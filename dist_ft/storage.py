"""The only door to fsspec: files, object stores and memory behind one small `Store`.

Guarantees: `write` is atomic (a reader sees the old bytes, the new bytes or nothing), transient failures are retried
with jitter, and every failure becomes one `StorageError` that names the URL without credentials. Does not cache.
"""

from __future__ import annotations

import os
import posixpath
from collections.abc import Iterator, Mapping
from typing import Any
from uuid import uuid4

from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from dist_ft.errors import StorageError
from dist_ft.logs import redact

ATTEMPTS = 5
_FINAL = (FileNotFoundError, FileExistsError, PermissionError, NotADirectoryError, IsADirectoryError, ValueError,
          ImportError, NotImplementedError)


def configure(options: Mapping[str, Mapping[str, Any]]) -> None:
    """Set fsspec options by protocol for this process (`storage.options` of the config)."""
    import fsspec.config

    for protocol, values in options.items():
        fsspec.config.conf.setdefault(protocol, {}).update(values)


def is_local(url: str) -> bool:
    """Tell whether `url` lies on a disk of this machine (or one mounted here)."""
    return "://" not in url or url.startswith(("file://", "local://"))


def local_path(url: str) -> str:
    """Return the path of a local `url`."""
    return url.split("://", 1)[1] if "://" in url else url


def _transient(error: BaseException) -> bool:
    """Tell whether trying again could help: network and server trouble, not a missing file or a full disk."""
    if isinstance(error, _FINAL) or not isinstance(error, Exception):
        return False
    import errno

    final = (errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EACCES)
    return not (isinstance(error, OSError) and error.errno in final)


def _explain(error: Exception) -> str:
    """Say in a few words what to do about `error`."""
    import errno

    code = getattr(error, "errno", None)
    if isinstance(error, FileNotFoundError):
        return "there is no such file or bucket; check the URL"
    if isinstance(error, PermissionError) or code in (errno.EACCES, errno.EROFS):
        return "access is refused; check credentials (in the environment) and permissions"
    if isinstance(error, ImportError):
        return "its fsspec package is not installed; install the extra for it, such as dist-ft[s3]"
    if code in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full; free some space or keep fewer checkpoints (checkpoint.keep_last)"
    if "credentials" in str(error).lower():
        return "no credentials were found; set them in the environment"
    return f"gave up after {ATTEMPTS} tries; check that the endpoint answers"


def _retrying() -> Retrying:
    return Retrying(stop=stop_after_attempt(ATTEMPTS), wait=wait_random_exponential(multiplier=0.2, max=5),
                    retry=retry_if_exception(_transient), reraise=True)


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

    def read(self, path: str, start: int | None = None, stop: int | None = None) -> bytes:
        """Return the bytes [start, stop) of a file, or all of them."""
        return self._call("read", path, lambda fs, full: fs.cat_file(full, start=start, end=stop))

    def write(self, path: str, content: bytes) -> None:
        """Write a file whole or not at all; on a local disk it is on the platter when this returns."""
        if is_local(self.url):
            return self._call("write", path, lambda fs, full: _write_local(full, content))
        return self._call("write", path, lambda fs, full: fs.pipe_file(full, content))

    def create(self, path: str, content: bytes) -> bool:
        """Write a file only if it does not exist; return whether it was this call that made it."""
        try:
            if is_local(self.url):
                self._call("write", path, lambda fs, full: _create_local(full, content))
            else:
                self._call("write", path, lambda fs, full: fs.pipe_file(full, content, mode="create"))
        except StorageError as error:
            if isinstance(error.__cause__, FileExistsError):
                return False
            raise
        return True

    def put(self, path: str, local: str) -> None:
        """Copy a local file to `path`."""
        self._call("write", path, lambda fs, full: fs.put_file(local, full))

    def get(self, path: str, local: str) -> None:
        """Copy `path` to a local file."""
        self._call("read", path, lambda fs, full: fs.get_file(full, local))

    def size(self, path: str) -> int:
        """Return the length of a file in bytes."""
        return int(self._call("read", path, lambda fs, full: fs.info(full))["size"])

    def exists(self, path: str = "") -> bool:
        """Tell whether a file or folder is there."""
        return bool(self._call("read", path, lambda fs, full: _exists(fs, full)))

    def walk(self, path: str = "") -> list[str]:
        """Return the sorted paths of all files below a folder, relative to this store."""
        return sorted(posixpath.join(path, name) if path else name for name in self._call("list", path, _below))

    def list(self, path: str = "") -> list[str]:
        """Return the sorted names in a folder; an absent folder has none."""
        return self._call("list", path, _names)

    def remove(self, path: str) -> None:
        """Remove a file or a folder; an absent one is no error."""
        self._call("remove", path, _remove)

    def _call(self, verb: str, path: str, action: Any) -> Any:
        full = self.full(path)
        try:
            for attempt in _retrying():
                with attempt:
                    fs, inner = filesystem(full)
                    return action(fs, inner)
        except Exception as error:
            what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            raise StorageError(redact(f"{full}: can not {verb} it ({what}); {_explain(error)}")) from error


def filesystem(url: str) -> tuple[Any, str]:
    """Return the fsspec filesystem of `url` and the path within it. Listings are not cached."""
    from fsspec.core import url_to_fs

    return url_to_fs(url, use_listings_cache=False) if not is_local(url) else url_to_fs(local_path(url))


def glob(url: str) -> list[str]:
    """Return the sorted URLs of the files that match `url` (a file, a glob, or a folder: all files below it)."""
    try:
        for attempt in _retrying():
            with attempt:
                fs, path = filesystem(url)
                if any(char in path for char in "*?["):
                    found = fs.glob(path)
                elif fs.isdir(path):
                    found = fs.find(path)
                else:
                    found = [path] if _exists(fs, path) else []
                return sorted(fs.unstrip_protocol(name) if not is_local(url) else name
                              for name in found if not fs.isdir(name))
    except Exception as error:
        raise StorageError(redact(f"{url}: can not list it ({error}); {_explain(error)}")) from error
    return []


def stat(url: str) -> dict[str, Any]:
    """Return {size, version} of a file; `version` changes when its content may have."""
    def ask(fs: Any, path: str) -> dict[str, Any]:
        info = fs.info(path)
        version = info.get("ETag") or info.get("etag") or info.get("md5Hash") or info.get("mtime")
        return {"size": int(info["size"] or 0), "version": str(version)}

    return Store(posixpath.dirname(url))._call("read", posixpath.basename(url), ask)


def arrow_filesystem(url: str) -> tuple[Any, str]:
    """Return a pyarrow filesystem over the same fsspec one (for Ray Train and Parquet), and the path within it."""
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    fs, path = filesystem(url)
    return PyFileSystem(FSSpecHandler(fs)), path


def _exists(fs: Any, path: str) -> bool:
    try:
        fs.info(path)
    except FileNotFoundError:
        return False
    return True


def _names(fs: Any, path: str) -> list[str]:
    try:
        found = fs.ls(path, detail=False, refresh=True)
    except FileNotFoundError:
        return []
    names = {posixpath.basename(name.rstrip("/")) for name in found if name.rstrip("/") != path.rstrip("/")}
    return sorted(name for name in names if not name.startswith(".tmp-"))


def _below(fs: Any, path: str) -> Iterator[str]:
    try:
        found = fs.find(path, refresh=True) if not is_local(path) else fs.find(path)
    except FileNotFoundError:
        return iter(())
    root = path.rstrip("/") + "/"
    names = (name[len(root):] for name in found if name.startswith(root))
    return iter([name for name in names if not posixpath.basename(name).startswith(".tmp-")])


def _remove(fs: Any, path: str) -> None:
    if _exists(fs, path):
        fs.rm(path, recursive=True)


def _write_local(path: str, content: bytes) -> None:
    """Write beside the target, force it to disk, rename over it."""
    folder, name = os.path.split(path)
    os.makedirs(folder, exist_ok=True)
    temporary = os.path.join(folder, f".tmp-{name}-{uuid4().hex[:8]}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.remove(temporary)
        raise


def _create_local(path: str, content: bytes) -> None:
    """As `_write_local`, but a file that is already there is an error (a hard link can not overwrite)."""
    folder, name = os.path.split(path)
    os.makedirs(folder, exist_ok=True)
    temporary = os.path.join(folder, f".tmp-{name}-{uuid4().hex[:8]}")
    with open(temporary, "xb") as file:
        file.write(content)
    try:
        os.link(temporary, path)
    finally:
        os.remove(temporary)
