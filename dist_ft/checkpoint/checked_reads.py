"""Files of a checkpoint, read in parts of which every byte is checked before anyone sees it.

A manifest holds a checksum for each block of a file; a part is widened to whole blocks. Where a
manifest holds none (an older checkpoint), the whole file is one block. What was spoilt on the way is read again, once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from itertools import cycle

import numpy as np

from dist_ft.checkpoint import manifest as manifests
from dist_ft.checkpoint.manifest import DamagedError, FileEntry
from dist_ft.core.errors import StorageError
from dist_ft.storage.filesystem import Store

IN_FLIGHT = 4
"""Parts on their way at once."""
AHEAD = 8
"""Parts that have come or are on their way before they are wanted: one that is slow does not hold up the others."""


@dataclass(frozen=True)
class CheckedBytes:
    """Bytes of a file from `start` on."""

    start: int
    content: memoryview

    def slice(self, start: int, stop: int) -> memoryview:
        """Return the bytes [start, stop) of the file."""
        return self.content[start - self.start : stop - self.start]


class ReusableBuffer:
    """Memory that is made once, as much as is needed, and used again: touching new pages costs as much as a copy."""

    def __init__(self) -> None:
        self._content = np.empty(0, np.uint8)

    def of(self, num_bytes: int) -> memoryview:
        """Return so many bytes of it."""
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
        own_disk: bool = False,
    ) -> None:
        """Take the checkpoint's folder, what its manifest says of its files, and the folder of those it shares.

        own_disk: what can not be read in the checkpoint's folder (not: what it shares) is damaged.
        """
        self._store = store
        self._own_disk = own_disk
        self._shared = shared
        self._entries = {entry.path: entry for entry in entries}

    @property
    def paths(self) -> Sequence[str]:
        """Their paths, in the manifest's order."""
        return list(self._entries)

    def shown(self, path: str = "") -> str:
        """Return the URL of a file, without credentials."""
        return self._of(path).shown(path)

    def _of(self, path: str) -> Store:
        """Return the folder a file lies in."""
        is_shared = path in self._entries and self._entries[path].shared
        return self._shared if is_shared and self._shared is not None else self._store

    def num_bytes(self, path: str) -> int:
        """Return the length of a file."""
        return self._entries[path].num_bytes

    def window(self, path: str, most: int) -> int:
        """Return how many bytes, a multiple of the file's blocks, to read at once where about `most` shall be."""
        block = self._block(path)
        return block * max(1, most // block)

    def _block(self, path: str) -> int:
        entry = self._entries[path]
        return entry.block_bytes or max(1, entry.num_bytes)

    def read(self, path: str, start: int, stop: int, memory: ReusableBuffer | None = None) -> CheckedBytes:
        """Return at least the bytes [start, stop), in `memory` if given.

        Raises DamagedError if they are not what was written.
        """
        entry, block = self._entries[path], self._block(path)
        first, last = start // block * block, min(entry.num_bytes, -(-stop // block) * block)
        if first == last:
            return CheckedBytes(first, memoryview(b""))
        for _ in range(2):
            content = self._fetch(path, first, (memory or ReusableBuffer()).of(last - first))
            if manifests.matches_checksum(entry, first, content):
                return CheckedBytes(first, content)
        raise DamagedError(f"{self.shown(path)}: its checksum differs from the manifest's")

    def _fetch(self, path: str, first: int, memory: memoryview) -> memoryview:
        try:
            return self._of(path).read_into(path, first, memory)
        except StorageError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                raise DamagedError(f"{self.shown(path)}: the file is not there") from error
            if self._own_disk and not self._entries[path].shared:
                raise DamagedError(str(error)) from error
            raise

    def read_all(self, ranges: Sequence[tuple[str, int, int]]) -> Iterator[CheckedBytes]:
        """Yield the parts that hold the ranges (path, start, stop), in their order, some of them read ahead.

        A part is good until the next is asked for: their memory is used again.
        """
        memories = cycle([ReusableBuffer() for _ in range(AHEAD + 1)])
        ahead: deque[Future[CheckedBytes]] = deque()
        threads = ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix="restore")
        try:
            for (path, start, stop), memory in zip(ranges, memories, strict=False):
                ahead.append(
                    threads.submit(
                        copy_context().run, partial(self.read, path, start, stop, memory)
                    )
                )
                if len(ahead) > AHEAD:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            # Not waited for: a reader that was dropped half-way ends here in the garbage collector, which may run while
            # a thread is just being started; to join one there takes a lock that is held already (CPython 3.11).
            threads.shutdown(wait=False, cancel_futures=True)
