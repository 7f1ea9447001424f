"""Reads ranges of a checkpoint's files and verifies every byte before returning it.

A manifest holds one checksum per block of a file, so a requested range is widened to whole blocks.
If the manifest has no block checksums (older checkpoints), the whole file is one block. A range
whose checksum differs is read once more, in case the damage happened in transit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import NamedTuple

import numpy as np

from dist_ft.checkpoint import manifest as manifests
from dist_ft.checkpoint.manifest import DamagedError, FileEntry
from dist_ft.core.errors import StorageError
from dist_ft.storage.error_messages import ShortFileError
from dist_ft.storage.filesystem import Store

NUM_CONCURRENT_READS = 4
NUM_READ_AHEAD = 8
"""Ranges requested before the caller needs them, so that a slow read does not delay the others."""


class ByteRange(NamedTuple):
    """Bytes [start, stop) of the file at `path`."""

    path: str
    start: int
    stop: int


@dataclass(frozen=True)
class CheckedBytes:
    """Verified bytes of a file.

    Attributes:
        start: offset in the file of the first byte of `content`.
    """

    start: int
    content: memoryview

    def slice(self, start: int, stop: int) -> memoryview:
        """Return the bytes [start, stop) of the file."""
        return self.content[start - self.start : stop - self.start]


class ReusableBuffer:
    """A buffer that grows on demand and is reused: touching new pages costs as much as a copy."""

    def __init__(self) -> None:
        self._content = np.empty(0, np.uint8)

    def view(self, num_bytes: int) -> memoryview:
        """Return the first `num_bytes` of the buffer, which is enlarged if needed."""
        if len(self._content) < num_bytes:
            self._content = np.empty(num_bytes, np.uint8)
        return memoryview(self._content)[:num_bytes]  # type: ignore[arg-type]


class CheckedFiles:
    """The files of one checkpoint."""

    def __init__(
        self,
        store: Store,
        entries: Iterable[FileEntry],
        shared: Store | None = None,
        unreadable_is_damaged: bool = False,
    ) -> None:
        """Store the arguments; nothing is read.

        Args:
            store: the checkpoint's folder.
            entries: the manifest's entries for its files.
            shared: the folder of the files that several checkpoints share.
            unreadable_is_damaged: treat a file in `store` (not in `shared`) that cannot be read as
                damaged. For a node's local disk.
        """
        self._store = store
        self._unreadable_is_damaged = unreadable_is_damaged
        self._shared = shared
        self._entries = {entry.path: entry for entry in entries}

    @property
    def paths(self) -> Sequence[str]:
        """The paths of the files, in the manifest's order."""
        return list(self._entries)

    def redacted_url(self, path: str = "") -> str:
        """Return the URL of a file, without credentials."""
        return self._store_of(path).redacted_url(path)

    def _store_of(self, path: str) -> Store:
        """Return the folder that contains the file."""
        is_shared = path in self._entries and self._entries[path].shared
        if is_shared and self._shared is not None:
            return self._shared
        return self._store

    def num_bytes(self, path: str) -> int:
        """Return the length of a file."""
        return self._entries[path].num_bytes

    def window_bytes(self, path: str, max_bytes: int) -> int:
        """Return the largest multiple of the block size up to `max_bytes`, at least one block."""
        block_bytes = self._block_bytes(path)
        return block_bytes * max(1, max_bytes // block_bytes)

    def _block_bytes(self, path: str) -> int:
        entry = self._entries[path]
        # At least 1, since callers divide by it and an empty file is allowed.
        return entry.block_bytes or max(1, entry.num_bytes)

    def read(
        self, path: str, start: int, stop: int, buffer: ReusableBuffer | None = None
    ) -> CheckedBytes:
        """Return at least the bytes [start, stop) of a file, stored in `buffer` if given.

        Raises:
            DamagedError: the bytes differ from what was written.
        """
        entry = self._entries[path]
        block_bytes = self._block_bytes(path)

        # Only whole blocks have a checksum. The last block of a file may be shorter.
        first = start // block_bytes * block_bytes
        last = min(entry.num_bytes, -(-stop // block_bytes) * block_bytes)
        if first == last:
            return CheckedBytes(first, memoryview(b""))

        if buffer is None:
            buffer = ReusableBuffer()
        for _ in range(2):
            content = self._fetch(path, first, buffer.view(last - first))
            if manifests.matches_checksum(entry, first, content):
                return CheckedBytes(first, content)

        raise DamagedError(f"{self.redacted_url(path)}: its checksum differs from the manifest's")

    def _fetch(self, path: str, start: int, target: memoryview) -> memoryview:
        try:
            return self._store_of(path).read_into(path, start, target)
        except StorageError as error:
            # Damage makes the run fall back to an earlier checkpoint. Storage that does not respond
            # is not damage: its latest checkpoint is still there.
            if isinstance(error.__cause__, FileNotFoundError):
                raise DamagedError(f"{self.redacted_url(path)}: the file is missing") from error
            if isinstance(error.__cause__, ShortFileError):
                raise DamagedError(
                    f"{self.redacted_url(path)}: is shorter than according to the manifest"
                ) from error
            if self._unreadable_is_damaged and not self._entries[path].shared:
                raise DamagedError(str(error)) from error
            raise

    def read_all(self, ranges: Sequence[ByteRange]) -> Iterator[CheckedBytes]:
        """Yield the bytes of each range, in order; the next ranges are read ahead.

        The yielded bytes are valid until the next item is requested, because buffers are reused.
        """
        # One for each range that is read ahead, and one for the range that the caller has.
        buffers = cycle([ReusableBuffer() for _ in range(NUM_READ_AHEAD + 1)])
        pending: deque[Future[CheckedBytes]] = deque()
        threads = ThreadPoolExecutor(NUM_CONCURRENT_READS, thread_name_prefix="restore")
        try:
            for (path, start, stop), buffer in zip(ranges, buffers, strict=False):
                read = partial(self.read, path, start, stop, buffer)
                # A thread of a pool does not see the caller's retry limit unless it gets a copy of
                # the context.
                pending.append(threads.submit(copy_context().run, read))
                if len(pending) > NUM_READ_AHEAD:
                    yield pending.popleft().result()

            while pending:
                yield pending.popleft().result()
        finally:
            # Do not wait. If the caller drops this generator half-way, this block runs in the
            # garbage collector, possibly while a thread is being started; joining a thread then
            # takes a lock that is already held (CPython 3.11).
            threads.shutdown(wait=False, cancel_futures=True)
