"""Fragments: (parameter name, flat offset, values) in safetensors files; reading any part of them back.

A worker writes the slots it owns (`images`); a reader asks for the slots it has, in whatever world, and gets the bytes
that overlap, in few merged range reads. Neither side knows the other's world size or ZeRO stage.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dist_ft.errors import CheckpointError
from dist_ft.storage import Store

PART_BYTES = 64 * 2**20
"""Most bytes of values in a file, and in one request: what is written, checked, sent, read at once."""
GAP_BYTES = 2**20
"""Ranges closer than this are read in one request."""
_DTYPES: dict[str, np.dtype[Any]] = {
    name: np.dtype(code) for name, code in
    {"F32": "<f4", "F64": "<f8", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "<i1", "U64": "<u8",
     "U32": "<u4", "U16": "<u2", "U8": "<u1", "BOOL": "?"}.items()}
HEADER_BYTES = 2**27
"""Longest header that is read."""


@dataclass(frozen=True)
class Located:
    """Where a fragment's bytes lie: `start` is its first byte in the file."""

    path: str
    offset: int
    numel: int
    start: int
    dtype: np.dtype


def read_header(store: Store, path: str, num_bytes: int) -> dict[tuple[str, str], list[Located]]:
    """Return what lies where in a fragment file; raises CheckpointError for a header that is not sound."""
    try:
        length = int.from_bytes(store.read(path, 0, 8), "little") if num_bytes >= 8 else 0
        if not 2 <= length <= min(num_bytes - 8, HEADER_BYTES):
            raise ValueError(f"header of {length} bytes in a file of {num_bytes}")
        header = json.loads(store.read(path, 8, 8 + length))
        found: dict[tuple[str, str], list[Located]] = defaultdict(list)
        for label, info in dict(header).items():
            if label != "__metadata__":
                name, key, located = _locate(path, label, info, 8 + length, num_bytes)
                found[name, key].append(located)
        return found
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        what = f"{type(error).__name__}: {error}" if isinstance(error, KeyError | RecursionError) else str(error)
        raise CheckpointError(f"{store.shown(path)}: not a sound fragment file ({what}); it will not be "
                              "loaded") from error


def _locate(path: str, label: str, info: dict[str, Any], start: int, num_bytes: int) -> tuple[str, str, Located]:
    """Return (parameter name, key, place) of one header entry; its values lie between `start` and the file's end."""
    key, offset, name = label.split(":", 2)
    begin, end = info["data_offsets"]
    dtype, (numel,) = _DTYPES[info["dtype"]], info["shape"]
    if not (offset.isascii() and offset.isdigit() and all(type(number) is int for number in (begin, end, numel))):
        raise ValueError(f"{label}: offsets and sizes must be whole numbers from 0")
    if not 0 <= begin <= end <= num_bytes - start or end - begin != numel * dtype.itemsize:
        raise ValueError(f"{label} lies outside the file")
    return name, key, Located(path, int(offset), numel, start + begin, dtype)


@dataclass(frozen=True)
class Wanted:
    """Elements [offset, offset + numel) of state `key` of parameter `name`; `index` is the asker's own number."""

    index: int
    name: str
    key: str
    offset: int
    numel: int


@dataclass(frozen=True)
class _Copy:
    """One overlap: `numel` elements at byte `start` of a file go to element `into` of request `index`."""

    index: int
    into: int
    numel: int
    start: int
    dtype: np.dtype

    @property
    def stop(self) -> int:
        return self.start + self.numel * self.dtype.itemsize


class FragmentReader:
    """Reads parts of parameters out of the fragment files of one checkpoint."""

    def __init__(self, store: Store, files: Sequence[tuple[str, int]]) -> None:
        """Take the folder and its (path, bytes) files; headers are read at the first request."""
        self._store = store
        self._files = files
        self._index: dict[tuple[str, str], list[Located]] | None = None

    def keys(self) -> set[tuple[str, str]]:
        """Return every (name, key) in the checkpoint."""
        return set(self._located())

    def _located(self) -> dict[tuple[str, str], list[Located]]:
        if self._index is None:
            index: dict[tuple[str, str], list[Located]] = defaultdict(list)
            for path, num_bytes in self._files:
                for where, found in read_header(self._store, path, num_bytes).items():
                    index[where].extend(found)
            self._index = index
        return self._index

    def read(self, name: str, key: str, offset: int, numel: int) -> np.ndarray:
        """Return elements [offset, offset + numel) as (numel,); raises CheckpointError if any is missing."""
        return next(self.read_many([Wanted(0, name, key, offset, numel)]))[1]

    def read_many(self, wanted: Sequence[Wanted]) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (index, values) for every request, each as soon as its last byte has come."""
        by_file = self._plan(wanted)
        buffers: dict[int, np.ndarray] = {}
        missing = {request.index: request.numel for request in wanted}
        sizes = dict(missing)
        for request in wanted:
            if request.numel == 0:
                yield request.index, np.zeros(0, np.float32)
        for path in sorted(by_file):
            for first, last, copies in _merge(by_file[path]):
                content = memoryview(self._store.read(path, first, last))
                for copy in copies:
                    values = np.frombuffer(content, copy.dtype, copy.numel, copy.start - first)
                    buffer = buffers.get(copy.index)
                    if buffer is None:
                        buffer = buffers[copy.index] = np.empty(sizes[copy.index], copy.dtype)
                    buffer[copy.into:copy.into + copy.numel] = values
                    missing[copy.index] -= copy.numel
                    if missing[copy.index] == 0:
                        yield copy.index, buffers.pop(copy.index)

    def _plan(self, wanted: Sequence[Wanted]) -> dict[str, list[_Copy]]:
        """Return the overlaps of `wanted` with the fragments, by file; raises CheckpointError for a hole."""
        located = self._located()
        by_file: dict[str, list[_Copy]] = defaultdict(list)
        for request in wanted:
            stop, reached = request.offset + request.numel, request.offset
            for piece in sorted(located.get((request.name, request.key), ()), key=lambda found: found.offset):
                begin, end = max(reached, piece.offset), min(stop, piece.offset + piece.numel)
                if begin > reached:
                    break
                if end > begin:
                    start = piece.start + (begin - piece.offset) * piece.dtype.itemsize
                    by_file[piece.path].append(
                        _Copy(request.index, begin - request.offset, end - begin, start, piece.dtype))
                    reached = end
            if reached < stop:
                raise CheckpointError(
                    f"{self._store.shown()}: elements from {reached} of {request.key} of {request.name} are not in "
                    "this checkpoint; it belongs to another model or optimizer; check model.path and optimizer.name")
        return by_file


def _merge(copies: list[_Copy]) -> Iterator[tuple[int, int, list[_Copy]]]:
    """Yield (first byte, last byte, copies) of requests that join neighbours up to PART_BYTES."""
    group: list[_Copy] = []
    first = last = 0
    for copy in sorted(copies, key=lambda item: item.start):
        if group and (copy.start > last + GAP_BYTES or copy.stop - first > PART_BYTES):
            yield first, last, group
            group = []
        if not group:
            first = last = copy.start
        group.append(copy)
        last = max(last, copy.stop)
    if group:
        yield first, last, group
