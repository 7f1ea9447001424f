"""Writes one worker's files of a checkpoint, either directly or in the background from a snapshot.

A snapshot is one copy into buffers that are allocated once and reused. At most one save is in
progress, so the memory needed is that of one copy. Several files are written, checksummed and
uploaded at a time. This module commits nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextvars import copy_context
from functools import partial
from typing import NamedTuple, TypeVar

import torch

from dist_ft.checkpoint import manifest as manifests
from dist_ft.checkpoint.file_layout import FileLayout, plan_files
from dist_ft.checkpoint.manifest import FileEntry
from dist_ft.core import fault_injection
from dist_ft.engine.base import Engine, StateSlice
from dist_ft.storage.filesystem import Store

T = TypeVar("T")
NUM_CONCURRENT_FILES = 4
MAX_PENDING_FILES = 3
"""Files still being written while the next one is prepared, in a save that training waits for."""


class _SliceAddress(NamedTuple):
    """Which elements of which state a slice holds."""

    name: str
    key: str
    offset: int
    numel: int


class _Throttle:
    """Limits the average rate of sending to `bytes_per_s` (0: no limit)."""

    def __init__(self, bytes_per_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._started = time.monotonic()
        self._sent_bytes = 0

    def wait_for(self, num_bytes: int) -> None:
        """Wait until `num_bytes` more may be sent, and count them as sent."""
        # An average since the start, so that a slow file may be made up for by later ones.
        if self._bytes_per_s:
            allowed_at = self._started + self._sent_bytes / self._bytes_per_s
            time.sleep(max(0.0, allowed_at - time.monotonic()))
        self._sent_bytes += num_bytes


class Writer:
    """Writes the state that this worker owns.

    `bytes_per_s` limits the rate of writing in the background (0: no limit).
    """

    def __init__(self, rank: int, bytes_per_s: float = 0) -> None:
        self._rank = rank
        self._bytes_per_s = bytes_per_s
        self._threads: ThreadPoolExecutor | None = None
        # The plan of snapshots: files of owned slices, then (if include_unowned was requested)
        # files of the others.
        self._addresses: list[_SliceAddress] | None = None
        self._layouts: list[FileLayout] = []
        self._num_owned_files = 0
        self._has_unowned = False
        self._buffers: list[torch.Tensor] = []

    def write(
        self,
        folder: Store,
        state: Sequence[StateSlice],
        include_unowned: bool = False,
        in_background: bool = False,
    ) -> list[FileEntry]:
        """Write the state, which must not change meanwhile; return the manifest's file entries.

        Values in host memory are written in place; other values need memory for a few files.

        Args:
            folder: the folder to write to.
            state: all slices of this worker.
            include_unowned: write all slices, not only those that this worker owns.
            in_background: respect the rate limit.
        """
        selected = [part for part in state if part.owned or include_unowned]
        throttle = _Throttle(self._bytes_per_s if in_background else 0)
        running: list[Future[FileEntry]] = []
        try:
            for number, layout in enumerate(plan_files(selected)):
                # Bounds the memory for values that are not in host memory, and ends early after an
                # error.
                if number >= MAX_PENDING_FILES:
                    running[number - MAX_PENDING_FILES].result()

                throttle.wait_for(layout.num_bytes)
                buffers = layout.as_buffers(selected)
                running.append(self.submit(partial(self._write_file, folder, number, buffers)))
        finally:
            # The caller removes the files of a failed save: nothing may be written after that.
            wait(running)

        return [file.result() for file in running]

    def prepare(self, state: Sequence[StateSlice], include_unowned: bool = False) -> None:
        """Allocate and touch the buffers, so that the first snapshot is as fast as the others.

        Args:
            state: all slices of this worker.
            include_unowned: there will be snapshots of all slices, not only of those that this
                worker owns.
        """
        ordered = _owned_first(state)
        addresses = [
            _SliceAddress(part.name, part.key, part.offset, part.numel) for part in ordered
        ]

        # The plan changes if an engine gets state that it did not have before.
        has_all_slices = self._has_unowned or not include_unowned
        if addresses == self._addresses and has_all_slices:
            return

        # Copies from a GPU run in the background only if their target is pinned.
        owned = [part for part in ordered if part.owned]
        pin_memory = bool(owned) and owned[0].read().is_cuda

        # Owned slices have files of their own, so that a snapshot without the others is a prefix.
        layouts = plan_files(owned)
        num_owned_files = len(layouts)
        if include_unowned:
            layouts += plan_files(ordered, len(owned))

        # Filled with 1, since the system provides pages of zeros only when they are first written.
        buffers = [
            torch.zeros(layout.num_bytes, dtype=torch.uint8, pin_memory=pin_memory).fill_(1)
            for layout in layouts
        ]

        # Set last and together: after an error above, the next call must plan again.
        self._layouts = layouts
        self._buffers = buffers
        self._num_owned_files = num_owned_files
        self._has_unowned = include_unowned
        self._addresses = addresses

    def snapshot(
        self, folder: Store, state: Sequence[StateSlice], include_unowned: bool = False
    ) -> Future[list[FileEntry]]:
        """Copy the state and write the copy in the background; return its future file entries.

        Arguments as for `write`.
        """
        self.prepare(state, include_unowned)
        ordered = _owned_first(state)
        num_files = self._num_owned_files
        if include_unowned:
            num_files = len(self._layouts)

        for layout, content in zip(self._layouts[:num_files], self._buffers, strict=False):
            layout.copy_into(ordered, content)

        # The copies must have ended before other threads read the buffers.
        if self._buffers and self._buffers[0].is_pinned():
            torch.cuda.synchronize()

        return self.submit(lambda: self._write_snapshot(folder, num_files))

    def submit(self, action: Callable[[], T]) -> Future[T]:
        """Run `action` in the background."""
        # One thread more than files: the task that starts them waits for them in a thread itself.
        if self._threads is None:
            self._threads = ThreadPoolExecutor(
                NUM_CONCURRENT_FILES + 1, thread_name_prefix="checkpoint"
            )

        # With the context, which holds the retry limit of the caller.
        return self._threads.submit(copy_context().run, action)

    def close(self) -> None:
        """Start no further file. Files being written are finished."""
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)

    def _write_snapshot(self, folder: Store, num_files: int) -> list[FileEntry]:
        throttle = _Throttle(self._bytes_per_s)
        running: list[Future[FileEntry]] = []
        try:
            for number, content in enumerate(self._buffers[:num_files]):
                throttle.wait_for(len(content))
                write = partial(self._write_file, folder, number, [_bytes_of(content)])
                running.append(self.submit(write))
            return [file.result() for file in running]
        finally:
            # As in `write`. Files that have not started would fill the space that is to be freed.
            for file in running:
                file.cancel()
            wait(running)

    def _write_file(self, folder: Store, number: int, content: Sequence[memoryview]) -> FileEntry:
        path = f"rank-{self._rank:05d}-{number:04d}.safetensors"
        fault_injection.hit("checkpoint.before_file", self._rank)
        folder.write(path, content)
        fault_injection.hit("checkpoint.after_file", self._rank)
        return manifests.file_entry_in_blocks(path, *content)


def trained_state(engine: Engine) -> list[StateSlice]:
    """Return the state that every checkpoint contains: all but frozen weights."""
    return [part for part in engine.state_slices() if part.key != "frozen"]


def _bytes_of(content: torch.Tensor) -> memoryview:
    return memoryview(content.numpy())  # type: ignore[arg-type]


def _owned_first(state: Sequence[StateSlice]) -> list[StateSlice]:
    """Return the state slices, those that this worker owns first."""
    # The sort is stable: both groups keep the engine's order, on which the plan depends.
    return sorted(state, key=lambda part: not part.owned)
