"""Read the bytes of a shard by ranged requests, several of them in flight.

Memory is bounded and each byte is fetched once. A range that fails is retried in smaller ranges, so
a connection that breaks after some bytes still makes progress. A body of the wrong length counts as
a failure. `storage` decides about retries, waiting and giving up.
"""

from __future__ import annotations

import io
import posixpath
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache

from dist_ft.core.errors import StorageError
from dist_ft.storage.filesystem import Store
from dist_ft.storage.retry import retry_limit

RANGE_BYTES = 4 * 2**20
"""Bytes of one request."""
MAX_IN_FLIGHT = 4
MIN_RANGE_BYTES = 64 * 2**10
"""Ranges are not halved below this."""


@lru_cache(maxsize=1)
def _threads() -> ThreadPoolExecutor:
    # one pool for the whole process, created on first use and not by an import
    return ThreadPoolExecutor(MAX_IN_FLIGHT, thread_name_prefix="dist_ft-fetch")


def stream_range(url: str, start: int, stop: int) -> Iterator[bytes]:
    """Yield the bytes [start, stop) of a file in order, while later ranges are fetched ahead."""
    folder, name = posixpath.split(url)
    store = Store(folder)

    # Most reads are small: no thread is needed for a single request.
    if stop - start <= RANGE_BYTES:
        if stop > start:
            yield fetch_range(store, name, start, stop)
        return

    in_flight: deque[Future[bytes]] = deque()
    try:
        for range_start in range(start, stop, RANGE_BYTES):
            range_stop = min(stop, range_start + RANGE_BYTES)
            in_flight.append(_threads().submit(fetch_range, store, name, range_start, range_stop))
            # bounds the memory: no further request starts before the oldest range is consumed
            if len(in_flight) == MAX_IN_FLIGHT:
                yield in_flight.popleft().result()

        while in_flight:
            yield in_flight.popleft().result()
    finally:
        # the caller may stop early
        for future in in_flight:
            future.cancel()


def read_range(url: str, start: int, stop: int) -> bytes:
    """Return the bytes [start, stop) of a file."""
    return b"".join(stream_range(url, start, stop))


def fetch_range(store: Store, name: str, start: int, stop: int) -> bytes:
    """Return one range. If the request fails, fetch its halves.

    Ranges of `MIN_RANGE_BYTES` or less are not halved: they are retried as `Store.read` does.
    """
    if stop - start <= MIN_RANGE_BYTES:
        return store.read(name, start, stop)

    # one attempt: repeating a large request that broke would fetch the same bytes again
    try:
        with retry_limit(1):
            return store.read(name, start, stop)
    except StorageError as error:
        # smaller requests cannot help against these
        if isinstance(error.__cause__, FileNotFoundError | PermissionError):
            raise

    middle = (start + stop) // 2
    return fetch_range(store, name, start, middle) + fetch_range(store, name, middle, stop)


class RandomAccessFile(io.RawIOBase):
    """A shard as a seekable file; each read fetches exactly the requested range.

    For decoders that seek to what they need (Parquet).
    """

    def __init__(self, url: str, size: int) -> None:
        """Assign only; nothing is read yet."""
        self._url = url
        self._size = size
        self._position = 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the position in bytes."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to a position."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        # beyond the end is allowed, as for any file: reads there return nothing
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        """Fill `buffer`, or as much as the file has left; return the number of bytes."""
        stop = min(self._size, self._position + len(buffer))
        content = read_range(self._url, self._position, stop)
        memoryview(buffer)[: len(content)] = content
        self._position += len(content)
        return len(content)


class ReadAheadFile(RandomAccessFile):
    """A shard as a file that reads ahead; for decoders that read it from start to end."""

    def __init__(self, url: str, size: int) -> None:
        """Assign only; nothing is read yet."""
        super().__init__(url, size)
        self._buffered = b""
        self._buffer_start = 0
        self._stream: Iterator[bytes] | None = None

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        """Fill some of `buffer`; return the number of bytes, 0 at the end."""
        # At most what is buffered: a raw file may return less than requested, and the caller's
        # BufferedReader calls again.
        offset = self._position - self._buffer_start
        if not 0 <= offset < len(self._buffered):
            if not self._advance():
                return 0
            offset = self._position - self._buffer_start

        count = min(len(buffer), len(self._buffered) - offset)
        memoryview(buffer)[:count] = self._buffered[offset : offset + count]
        self._position += count
        return count

    def _advance(self) -> bool:
        """Buffer the range that holds the position; return False at the end of the file."""
        if self._position >= self._size:
            return False

        # After a seek, the ranges in flight are the wrong ones: start again at the position.
        is_sequential = self._position == self._buffer_start + len(self._buffered)
        if self._stream is None or not is_sequential:
            self._stream = stream_range(self._url, self._position, self._size)

        self._buffered = next(self._stream)
        self._buffer_start = self._position
        return True
