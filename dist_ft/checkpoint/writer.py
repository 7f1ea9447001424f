"""Writing one worker's files of a checkpoint: now, or from a snapshot while training goes on.

Guarantees: a snapshot is one copy into buffers that are made once and used again; at most one save is under way, so
the memory is that of one copy. Files are written, checksummed and uploaded several at a time. Commits nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextvars import copy_context
from functools import partial
from typing import TypeVar

import torch

from dist_ft.checkpoint import manifest as manifests
from dist_ft.checkpoint.file_layout import FileLayout, plan_files
from dist_ft.checkpoint.manifest import FileEntry
from dist_ft.core import fault_injection
from dist_ft.engine.base import StateSlice
from dist_ft.storage.filesystem import Store

T = TypeVar("T")
IN_FLIGHT = 4
"""Files written at once."""
AHEAD = 3
"""Files still being written while the next one is made, where training waits for them."""


class Writer:
    """Writes what this worker owns; `bytes_per_s` bounds what leaves it in the background (0: no bound)."""

    def __init__(self, rank: int, bytes_per_s: float = 0) -> None:
        self._rank = rank
        self._bytes_per_s = bytes_per_s
        self._threads: ThreadPoolExecutor | None = None
        self._shape: list[tuple[str, str, int, int]] | None = None
        self._plan: list[FileLayout] = []
        self._num_owned = 0
        self._everything = False
        self._buffers: list[torch.Tensor] = []

    def write(
        self,
        folder: Store,
        slots: Sequence[StateSlice],
        everything: bool = False,
        in_background: bool = False,
    ) -> list[FileEntry]:
        """Write the slots this worker owns, or all; they must not change meanwhile. Return the manifest's entries.

        What lies in host memory is written from where it lies; a few files' worth of memory for the rest.
        """
        chosen = [slot for slot in slots if slot.owned or everything]
        running: list[Future[FileEntry]] = []
        begun, sent = time.monotonic(), 0
        try:
            for part, layout in enumerate(plan_files(chosen)):
                if part >= AHEAD:
                    running[part - AHEAD].result()
                if in_background and self._bytes_per_s:
                    time.sleep(max(0.0, begun + sent / self._bytes_per_s - time.monotonic()))
                sent += layout.num_bytes
                running.append(self.later(partial(self._write, folder, part, layout.parts(chosen))))
        finally:
            wait(running)  # what fails is cleared away: nothing may be written after
        return [file.result() for file in running]

    def prepare(self, slots: Sequence[StateSlice], everything: bool = False) -> None:
        """Make the buffers of snapshots and touch them, so that the first snapshot costs no more than the others.

        `everything`: there will be snapshots of all slots, not only of those this worker owns.
        """
        ordered = _ordered(slots)
        shape = [(slot.name, slot.key, slot.offset, slot.numel) for slot in ordered]
        owned = [slot for slot in ordered if slot.owned]
        if shape != self._shape or (everything and not self._everything):
            pinned = any(slot.read().is_cuda for slot in owned[:1])
            self._shape, self._plan = shape, plan_files(owned)
            self._num_owned, self._everything = len(self._plan), everything
            if everything:
                self._plan += plan_files(ordered, len(owned))
            self._buffers = [
                torch.zeros(layout.num_bytes, dtype=torch.uint8, pin_memory=pinned).fill_(1)
                for layout in self._plan
            ]

    def snapshot(
        self, folder: Store, slots: Sequence[StateSlice], everything: bool = False
    ) -> Future[list[FileEntry]]:
        """Copy what this worker owns, or all it has, and write the copy in the background; the future gives entries."""
        self.prepare(slots, everything)
        ordered, count = _ordered(slots), len(self._plan) if everything else self._num_owned
        for layout, content in zip(self._plan[:count], self._buffers, strict=False):
            layout.fill(ordered, content)
        if self._buffers and self._buffers[0].is_pinned():
            torch.cuda.synchronize()
        return self.later(lambda: self._write_all(folder, count))

    def later(self, action: Callable[[], T]) -> Future[T]:
        """Run `action` in the background."""
        if self._threads is None:
            self._threads = ThreadPoolExecutor(IN_FLIGHT + 1, thread_name_prefix="checkpoint")
        return self._threads.submit(copy_context().run, action)

    def close(self) -> None:
        """Begin no further file; those being written end by themselves."""
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)

    def _write_all(self, folder: Store, count: int) -> list[FileEntry]:
        begun, sent = time.monotonic(), 0
        running: list[Future[FileEntry]] = []
        try:
            for part, content in enumerate(self._buffers[:count]):
                if self._bytes_per_s:
                    time.sleep(max(0.0, begun + sent / self._bytes_per_s - time.monotonic()))
                running.append(self.later(partial(self._write, folder, part, [_bytes_of(content)])))
                sent += len(content)
            return [file.result() for file in running]
        finally:
            for file in running:
                file.cancel()
            wait(running)  # as above

    def _write(self, folder: Store, part: int, content: Sequence[memoryview]) -> FileEntry:
        path = f"rank-{self._rank:05d}-{part:04d}.safetensors"
        fault_injection.hit("checkpoint.before_file", self._rank)
        folder.write(path, content)
        fault_injection.hit("checkpoint.after_file", self._rank)
        return manifests.file_entry_in_blocks(path, *content)


def _bytes_of(content: torch.Tensor) -> memoryview:
    return memoryview(content.numpy())  # type: ignore[arg-type]


def _ordered(slots: Sequence[StateSlice]) -> list[StateSlice]:
    """Return `slots`, those this worker owns first."""
    return sorted(slots, key=lambda slot: not slot.owned)
