"""Bytes of a shard, by ranged reads: several in flight, bounded memory, and what has come is never asked for again.

A range that fails is tried again in smaller pieces, so that a connection that breaks after some bytes still makes
progress; a body of the wrong length is a failure like any other. Trying again, waiting and giving up are `storage`'s.
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
MAX_IN_FLIGHT = 4
MIN_RANGE_BYTES = 64 * 2**10
"""Ranges are not halved below this."""


@lru_cache(maxsize=1)
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(MAX_IN_FLIGHT, thread_name_prefix="dist_ft-fetch")


def stream_range(url: str, start: int, stop: int) -> Iterator[bytes]:
    """Yield the bytes [start, stop) of a file in order, ranges ahead being fetched meanwhile."""
    folder, name = posixpath.split(url)
    store = Store(folder)
    if stop - start <= RANGE_BYTES:
        if stop > start:
            yield fetch_range(store, name, start, stop)
        return
    ahead: deque[Future[bytes]] = deque()
    begins = iter(range(start, stop, RANGE_BYTES))
    try:
        for begin in begins:
            ahead.append(
                _threads().submit(fetch_range, store, name, begin, min(stop, begin + RANGE_BYTES))
            )
            if len(ahead) == MAX_IN_FLIGHT:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        for waiting in ahead:
            waiting.cancel()


def read_range(url: str, start: int, stop: int) -> bytes:
    """Return the bytes [start, stop) of a file."""
    return b"".join(stream_range(url, start, stop))


def fetch_range(store: Store, name: str, start: int, stop: int) -> bytes:
    """Return one range; where it fails, its halves, down to LEAST_BYTES, which are then tried as `Store.read` does."""
    if stop - start <= MIN_RANGE_BYTES:
        return store.read(name, start, stop)
    try:
        with retry_limit(1):
            return store.read(name, start, stop)
    except StorageError as error:
        if isinstance(error.__cause__, FileNotFoundError | PermissionError):
            raise
    middle = (start + stop) // 2
    return fetch_range(store, name, start, middle) + fetch_range(store, name, middle, stop)


class RandomAccessFile(io.RawIOBase):
    """A shard as a seekable file whose every read is that range; for decoders that know what they want."""

    def __init__(self, url: str, size: int) -> None:
        """Assign only; nothing is read yet."""
        self._url, self._size = url, size
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
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        """Fill `buffer`, or what is left of the file; return how many bytes."""
        content = read_range(self._url, self._position, min(self._size, self._position + len(buffer)))
        memoryview(buffer)[: len(content)] = content
        self._position += len(content)
        return len(content)


class ReadAheadFile(RandomAccessFile):
    """A shard as a file that reads ahead; for decoders that go through it."""

    def __init__(self, url: str, size: int) -> None:
        """Assign only; nothing is read yet."""
        super().__init__(url, size)
        self._held, self._held_at = b"", 0
        self._stream: Iterator[bytes] | None = None

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        """Fill some of `buffer`; return how many bytes, 0 at the end."""
        place = self._position - self._held_at
        if not 0 <= place < len(self._held):
            if not self._advance():
                return 0
            place = self._position - self._held_at
        count = min(len(buffer), len(self._held) - place)
        memoryview(buffer)[:count] = self._held[place : place + count]
        self._position += count
        return count

    def _advance(self) -> bool:
        """Hold the range in which the position lies."""
        if self._position >= self._size:
            return False
        continues = self._position == self._held_at + len(self._held)
        if self._stream is None or not continues:
            self._stream = stream_range(self._url, self._position, self._size)
        self._held_at, self._held = self._position, next(self._stream)
        return True
