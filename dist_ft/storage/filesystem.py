"""The only door to fsspec: files, object stores and memory behind one small `Store`.

Guarantees: `write` is atomic (a reader sees the old bytes, the new bytes or nothing), transient
errors are retried with jitter, and every failure becomes one `StorageError` that names the URL
without credentials. Does not cache.
"""

from __future__ import annotations

import os
import posixpath
from collections.abc import Callable, Mapping, Sequence
from threading import Lock
from typing import Any, NamedTuple

from dist_ft.core import fault_injection
from dist_ft.core.errors import StorageError
from dist_ft.core.logs import redact
from dist_ft.core.printable import printable_line
from dist_ft.storage import http_client, listing, local_files
from dist_ft.storage.error_messages import ShortFileError, explain, is_empty_range, s3_code
from dist_ft.storage.listing import FileInfo
from dist_ft.storage.retry import max_attempts, with_retries

_filesystems: dict[tuple[int, str], Any] = {}
_lock = Lock()


class FilesystemPath(NamedTuple):
    """A filesystem and a path in it.

    Attributes:
        filesystem: fsspec's, or pyarrow's.
        path: without protocol.
    """

    filesystem: Any
    path: str


def configure(options: Mapping[str, Mapping[str, Any]]) -> None:
    """Set fsspec options by protocol for this process (`storage.options` of the config)."""
    import fsspec.config

    for protocol, values in options.items():
        fsspec.config.conf.setdefault(protocol, {}).update(values)

    # Filesystems that exist already would keep the old options.
    forget()


def forget() -> None:
    """Reconnect at the next call: options or credentials may have changed."""
    with _lock:
        _filesystems.clear()


def warm(url: str) -> None:
    """Import the packages that this URL needs; nothing is contacted."""
    import fsspec

    protocol = "file"
    if not is_local(url):
        protocol = url.split("://", 1)[0]
    fsspec.get_filesystem_class(protocol)


def is_local(url: str) -> bool:
    """Whether `url` is on a disk of this machine (or one mounted here)."""
    return "://" not in url or url.startswith(("file://", "local://"))


def local_path(url: str) -> str:
    """Return the path of a local `url`; `~` is the home folder."""
    path = url
    if "://" in url:
        path = url.split("://", 1)[1]
    return os.path.expanduser(path)


class Store:
    """A folder at an fsspec URL; all paths are relative to it and have '/' as separator.

    All methods but those that only build URLs raise StorageError.
    """

    def __init__(self, url: str) -> None:
        """Assign only: nothing is contacted before the first call."""
        if is_local(url):
            # Absolute, so that the store stays the same if the process changes its folder.
            self.url = os.path.abspath(local_path(url))
        else:
            self.url = url.rstrip("/")

    def __repr__(self) -> str:
        return f"Store({redact(self.url)!r})"

    def child(self, path: str) -> Store:
        """Return the store of a subfolder."""
        return Store(self.full_url(path))

    def full_url(self, path: str = "") -> str:
        """Return the full URL of `path`."""
        return f"{self.url}/{path}" if path else self.url

    def redacted_url(self, path: str = "") -> str:
        """Return the full URL of `path` without credentials, for errors and logs."""
        # Names come from listings, and may hold anything that a file system allows.
        return printable_line(redact(self.full_url(path)))

    def read(self, path: str, start: int | None = None, stop: int | None = None) -> bytes:
        """Return the bytes [start, stop) of a file, or all; fewer bytes are an error."""

        def fetch(fs: Any, full: str) -> bytes:
            # Checked within the call, so that an incomplete answer is retried.
            content = self._fetch(fs, full, start, stop)
            return _require_complete(content, start, stop, is_local(self.url))

        return self._call("read", path, fetch)

    def _fetch(self, fs: Any, full: str, start: int | None, stop: int | None) -> bytes:
        """Return the bytes [start, stop) of a file, or as many as it has."""
        # Not through fsspec: it would wait forever for the writer of a named pipe.
        if is_local(self.url):
            return local_files.read_range(full, start, stop)
        return fs.cat_file(full, start=start, end=stop)

    def read_at_most(self, path: str, max_bytes: int) -> bytes:
        """Return a whole file; one of more than `max_bytes` is an error, and not read further."""

        def fetch(fs: Any, full: str) -> bytes:
            if is_local(self.url):
                return local_files.read_regular(full, max_bytes)

            # One request, as a HEAD request for the size would be a second one.
            try:
                content = fs.cat_file(full, start=0, end=max_bytes + 1)
            except Exception as error:
                # Stores refuse every range of an empty file.
                if not is_empty_range(error):
                    raise
                content = b""
            return local_files.require_size(content, max_bytes)

        return self._call("read", path, fetch)

    def read_into(self, path: str, start: int, memory: memoryview) -> memoryview:
        """Return as many bytes of a file, from `start` on, as `memory` holds.

        Those of a local disk are in `memory`.
        """
        stop = start + len(memory)
        if not is_local(self.url):
            # fsspec has no way to read into existing memory; copying the bytes would gain nothing.
            return memoryview(self.read(path, start, stop))

        def fetch(fs: Any, full: str) -> memoryview:
            content = local_files.read_into(full, start, memory)
            return _require_complete(content, start, stop, is_own_file=True)

        return self._call("read", path, fetch)

    def write(self, path: str, content: bytes | memoryview | Sequence[memoryview]) -> None:
        """Write a file atomically, from bytes or parts of them; a local file is synced."""
        if is_local(self.url):
            return self._call("write", path, lambda fs, full: local_files.write_file(full, content))

        # One PUT request is atomic by itself, but needs the content in one piece.
        data = bytes(content) if isinstance(content, bytes | memoryview) else b"".join(content)
        return self._call("write", path, lambda fs, full: fs.pipe_file(full, data))

    def create(self, path: str, content: bytes) -> bool:
        """Write a file only if it does not exist; return whether this call created it."""

        def create(fs: Any, full: str) -> None:
            if is_local(self.url):
                local_files.create_file(full, content)
            else:
                fs.pipe_file(full, content, mode="create")

        try:
            self._call("write", path, create)
        except StorageError as error:
            # Also the result if the answer to a first request was lost: its retry finds the file.
            # So False does not prove that another process was first.
            if isinstance(error.__cause__, FileExistsError):
                return False
            raise
        return True

    def download(
        self, folder: str, is_selected: Callable[[str], bool] = lambda path: True
    ) -> list[str]:
        """Copy the selected files below this store into a local folder; return their paths.

        Raises:
            StorageError: also for a path that leaves the folder: stores allow "../" in names.
        """
        names = [name for name in self.walk() if is_selected(name)]
        for name in names:
            if name.startswith("/") or "\\" in name or ".." in name.split("/"):
                raise StorageError(
                    f"{self.redacted_url(name)}: the name leaves the folder that files are copied "
                    "to. Allowed: plain relative names. Remove that file."
                )

            target = os.path.join(folder, name)
            os.makedirs(os.path.dirname(target), exist_ok=True)
            self._get(name, target)

        return names

    def _get(self, path: str, local: str) -> None:
        def copy(fs: Any, full: str) -> None:
            if is_local(self.url):
                local_files.require_regular(full)
            fs.get_file(full, local)

        self._call("read", path, copy)

    def sizes(self, path: str = "") -> dict[str, int]:
        """Return {path relative to the folder: bytes} of all files below a folder; one listing."""
        return self._call("list", path, listing.sizes)

    def file_infos(self, path: str = "") -> dict[str, FileInfo]:
        """Return {path relative to the folder: info} of all files below a folder; one listing."""
        return self._call("list", path, listing.file_infos)

    def exists(self, path: str = "") -> bool:
        """Whether a file or folder exists."""
        return bool(self._call("read", path, listing.exists))

    def walk(self, path: str = "") -> list[str]:
        """Return the sorted paths of all files below a folder, relative to this store."""
        names = list(self.sizes(path))
        if path:
            names = [posixpath.join(path, name) for name in names]
        return sorted(names)

    def list(self, path: str = "") -> list[str]:
        """Return the sorted names in a folder; an absent folder has none."""
        return self._call("list", path, listing.names)

    def remove(self, path: str) -> None:
        """Remove a file or a folder; an absent one is no error."""
        self._call("remove", path, _remove)

    def remove_leftovers(self) -> int:
        """Remove files that killed processes left half-written; return their number."""
        return local_files.remove_leftovers(self.url) if is_local(self.url) else 0

    def _call(self, verb: str, path: str, action: Callable[[Any, str], Any]) -> Any:
        place = f"{verb}.{path.split('/', 1)[0]}"  # such as write.attempts
        fault_injection.hit(f"storage.before_{place}")
        result = attempt(verb, self.full_url(path), action)
        fault_injection.hit(f"storage.after_{place}")
        return result


def _require_complete(content: Any, start: int | None, stop: int | None, is_own_file: bool) -> Any:
    """Return `content`; raise OSError if it is shorter than the bytes [start, stop) of a file."""
    if stop is None:
        return content

    start = start or 0
    if len(content) != stop - start:
        problem = f"got {len(content)} of {stop - start} bytes from offset {start}"
        if is_own_file:
            raise ShortFileError(problem)
        # OSError is retried: a connection that breaks may look like the end of the body.
        raise OSError(problem)
    return content


def attempt(verb: str, url: str, action: Callable[[Any, str], Any]) -> Any:
    """Return `action(filesystem, path)` of `url`, with retries; raises StorageError."""

    def connect_and_act() -> Any:
        # Connecting is part of the attempt: it may need the network, and then fails as well.
        return action(*filesystem(url))

    try:
        return with_retries(url, connect_and_act, can_hang=not is_local(url))
    except Exception as error:
        cause = type(error).__name__
        if str(error):
            cause += f": {error}"
        if s3_code(error):
            cause += f"; S3 code {s3_code(error)}"

        advice = explain(error, max_attempts())
        name = printable_line(url)
        raise StorageError(redact(f"{name}: cannot {verb} it ({cause}). {advice}")) from error


def filesystem(url: str) -> FilesystemPath:
    """Return the fsspec filesystem of `url` and the path within it. Listings are not cached.

    All threads share one filesystem per bucket or host: fsspec creates one per thread, each with
    its own session.
    """
    from fsspec.core import url_to_fs

    if is_local(url):
        return FilesystemPath(*url_to_fs(local_path(url)))
    if "::" in url:
        # A chain such as zip://a::s3://bucket/b: its filesystem depends on the whole URL.
        return FilesystemPath(*url_to_fs(url))

    # By process: fsspec's asynchronous filesystems raise an error if they are used after a fork.
    key = os.getpid(), "/".join(url.split("/")[:3])
    with _lock:
        fs = _filesystems.get(key)
        if fs is None:
            fs = _filesystems[key] = _connect(url)

    return FilesystemPath(fs, fs._strip_protocol(url))


def _connect(url: str) -> Any:
    import fsspec.config
    from fsspec.core import url_to_fs

    protocol = url.split("://", 1)[0]
    configured = fsspec.config.conf.get(protocol, {})

    # Other workers and attempts write to the same folders: a cached listing would hide their files.
    options = http_client.client_options(protocol, configured)
    fs, _ = url_to_fs(url, use_listings_cache=False, **options)
    if protocol in ("s3", "s3a"):
        # s3fs has a loop of retries around the client's own; see `http_client`.
        fs.retries = 1
    return fs


def glob(url: str) -> dict[str, FileInfo]:
    """Return {URL: info}, sorted, of the files that match `url`.

    Args:
        url: URL of a file, a glob, or a folder (all files below).

    Listings suffice: no request is made per file.
    """

    def find(fs: Any, path: str) -> dict[str, FileInfo]:
        infos: dict[str, FileInfo] = {}
        for name, info in listing.matching(fs, path).items():
            file_url = name
            if not is_local(url):
                file_url = fs.unstrip_protocol(name)
            infos[file_url] = listing.file_info(info)
        return infos

    return attempt("list", url, find)


def stat(url: str) -> FileInfo:
    """Return size and version of a file; see `glob`."""
    return attempt("read", url, lambda fs, path: listing.file_info(fs.info(path)))


def arrow_filesystem(url: str) -> FilesystemPath:
    """Return a pyarrow filesystem over the fsspec one (for Ray Train and Parquet), and the path."""
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    fs, path = filesystem(url)
    if not is_local(url):
        # Ray compares filesystems, and fsspec's are equal within one thread only.
        fs = _connect(url)
    return FilesystemPath(PyFileSystem(FSSpecHandler(fs)), path)


def _remove(fs: Any, path: str) -> None:
    # Most filesystems raise an error for an absent path, which here is a success.
    if listing.exists(fs, path):
        fs.rm(path, recursive=True)
