"""Fragments: (parameter name, flat offset, values) in safetensors files; reading any part of them back.

A worker writes the slots it owns (`images`); a reader asks for the slots it has, in whatever world, and gets the bytes
that overlap: read once, in few merged requests, several on their way, each checked before it is given out (`blocks`).
Neither side knows the other's world size or ZeRO stage.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np

from dist_ft.checkpoint.checked_reads import CheckedFiles, CheckedBytes
from dist_ft.core.errors import CheckpointError, DistFtError
from dist_ft.core.world import Collectives, World, raise_together

MAX_FILE_BYTES = 64 * 2**20
"""Most bytes of values in a file: what is written, checked, sent at once."""
MAX_REQUEST_BYTES = 16 * 2**20
"""Most bytes read at once."""
MAX_GAP_BYTES = 2**21
"""Ranges closer than this are read in one request."""
_DTYPES: dict[str, np.dtype[Any]] = {
    name: np.dtype(code)
    for name, code in {
        "F32": "<f4",
        "F64": "<f8",
        "F16": "<f2",
        "I64": "<i8",
        "I32": "<i4",
        "I16": "<i2",
        "I8": "<i1",
        "U64": "<u8",
        "U32": "<u4",
        "U16": "<u2",
        "U8": "<u1",
        "BOOL": "?",
    }.items()
}
MAX_HEADER_BYTES = 2**27
"""Longest header that is read."""


@dataclass(frozen=True)
class FragmentLocation:
    """Where a fragment's bytes lie: `start` is its first byte in the file."""

    path: str
    offset: int
    numel: int
    start: int
    dtype: np.dtype


FragmentIndex = dict[tuple[str, str], list[FragmentLocation]]
"""What lies where, by (parameter name, key)."""


def read_index(files: CheckedFiles, paths: Sequence[str]) -> FragmentIndex:
    """Return what lies in some of a checkpoint's files; raises CheckpointError for a header that is not sound."""
    index: FragmentIndex = defaultdict(list)
    begins = files.read_all([(path, 0, min(files.num_bytes(path), 8)) for path in paths])
    for path, begin in zip(paths, begins, strict=True):
        for where, found in _read_header(files, path, begin).items():
            index[where].extend(found)
    return index


def gather_index(files: CheckedFiles, world: World, collectives: Collectives) -> FragmentIndex:
    """Return what lies in all files of a checkpoint, each header having been read by one rank; a collective call."""
    own: FragmentIndex = {}
    problem: DistFtError | None = None
    try:
        own = read_index(files, [files.paths[i] for i in world.share(len(files.paths))])
    except DistFtError as error:
        problem = error
    raise_together(collectives, problem)
    index: FragmentIndex = defaultdict(list)
    for part in collectives.all_gather(own):
        for where, found in part.items():
            index[where].extend(found)
    return index


def _read_header(files: CheckedFiles, path: str, begin: CheckedBytes) -> FragmentIndex:
    """Return what lies where in a file, of which the first block was read."""
    num_bytes = files.num_bytes(path)
    try:
        length = int.from_bytes(begin.slice(0, 8), "little") if num_bytes >= 8 else 0
        if not 2 <= length <= min(num_bytes - 8, MAX_HEADER_BYTES):
            raise ValueError(f"header of {length} bytes in a file of {num_bytes}")
        whole = begin if 8 + length <= len(begin.content) else files.read(path, 0, 8 + length)
        header = json.loads(bytes(whole.slice(8, 8 + length)))
        found: FragmentIndex = defaultdict(list)
        for label, info in dict(header).items():
            if label != "__metadata__":
                name, key, located = _locate(path, label, info, 8 + length, num_bytes)
                found[name, key].append(located)
        return found
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        what = (
            f"{type(error).__name__}: {error}"
            if isinstance(error, KeyError | RecursionError)
            else str(error)
        )
        raise CheckpointError(
            f"{files.shown(path)}: not a sound fragment file ({what}); it will not be loaded"
        ) from error


def _locate(
    path: str, label: str, info: dict[str, Any], start: int, num_bytes: int
) -> tuple[str, str, FragmentLocation]:
    """Return (parameter name, key, place) of one header entry; its values lie between `start` and the file's end."""
    key, offset, name = label.split(":", 2)
    begin, end = info["data_offsets"]
    dtype, (numel,) = _DTYPES[info["dtype"]], info["shape"]
    if not (
        offset.isascii()
        and offset.isdigit()
        and all(type(number) is int for number in (begin, end, numel))
    ):
        raise ValueError(f"{label}: offsets and sizes must be whole numbers from 0")
    if not 0 <= begin <= end <= num_bytes - start or end - begin != numel * dtype.itemsize:
        raise ValueError(f"{label} lies outside the file")
    return name, key, FragmentLocation(path, int(offset), numel, start + begin, dtype)


@dataclass(frozen=True)
class FragmentRequest:
    """Elements [offset, offset + numel) of state `key` of parameter `name`; `index` is the asker's own number."""

    index: int
    name: str
    key: str
    offset: int
    numel: int


@dataclass(frozen=True)
class _Copy:
    """One overlap: the bytes [start, stop) of a file go to byte `into` of request `index`."""

    index: int
    into: int
    path: str
    start: int
    stop: int
    dtype: np.dtype


class FragmentReader:
    """Reads parts of parameters out of the fragment files of one checkpoint."""

    def __init__(self, files: CheckedFiles, index: FragmentIndex | None = None) -> None:
        """Take the files, and what lies where in them; none: all headers are read at the first request."""
        self._files = files
        self._index = index

    def shown(self) -> str:
        """Return the URL of the checkpoint, without credentials."""
        return self._files.shown()

    def keys(self) -> set[tuple[str, str]]:
        """Return every (name, key) in the checkpoint."""
        return set(self._located())

    def _located(self) -> FragmentIndex:
        if self._index is None:
            self._index = read_index(self._files, self._files.paths)
        return self._index

    def read(self, name: str, key: str, offset: int, numel: int) -> np.ndarray:
        """Return elements [offset, offset + numel) as (numel,); raises CheckpointError if any is missing."""
        return next(self.read_many([FragmentRequest(0, name, key, offset, numel)]))[1]

    def read_many(self, wanted: Sequence[FragmentRequest]) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (index, values) for every request, each as soon as its last byte has come; good until the next.

        Raises DamagedError if bytes are not what was written; none of those has been given out then.
        """
        requests = list(_merge(self._plan(wanted), self._files))
        sizes = {request.index: request.numel for request in wanted}
        buffers: dict[int, np.ndarray] = {}
        missing: dict[int, int] = {}
        for request in wanted:
            if request.numel == 0:
                yield request.index, np.zeros(0, np.float32)
        parts = self._files.read_all([(path, first, last) for path, first, last, _ in requests])
        for part, (*_, copies) in zip(parts, requests, strict=True):
            for copy in copies:
                content = np.frombuffer(part.slice(copy.start, copy.stop), np.uint8)
                if len(content) == sizes[copy.index] * copy.dtype.itemsize:
                    values = content.view(copy.dtype)
                    if (
                        values.flags.aligned and values.flags.writeable
                    ):  # torch wants to be able to write
                        yield copy.index, values
                        continue
                buffer = buffers.get(copy.index)
                if buffer is None:
                    buffer = buffers[copy.index] = np.empty(sizes[copy.index], copy.dtype)
                    missing[copy.index] = buffer.nbytes
                buffer.view(np.uint8)[copy.into : copy.into + len(content)] = content
                missing[copy.index] -= len(content)
                if missing[copy.index] == 0:
                    yield copy.index, buffers.pop(copy.index)

    def _plan(self, wanted: Sequence[FragmentRequest]) -> list[_Copy]:
        """Return the overlaps of `wanted` with the fragments; raises CheckpointError for a hole."""
        located = self._located()
        copies: list[_Copy] = []
        for request in wanted:
            stop, reached = request.offset + request.numel, request.offset
            for piece in sorted(
                located.get((request.name, request.key), ()), key=lambda found: found.offset
            ):
                begin, end = max(reached, piece.offset), min(stop, piece.offset + piece.numel)
                if begin > reached:
                    break
                if end > begin:
                    width = piece.dtype.itemsize
                    start = piece.start + (begin - piece.offset) * width
                    copies.append(
                        _Copy(
                            request.index,
                            (begin - request.offset) * width,
                            piece.path,
                            start,
                            start + (end - begin) * width,
                            piece.dtype,
                        )
                    )
                    reached = end
            if reached < stop:
                raise CheckpointError(
                    f"{self._files.shown()}: elements from {reached} of {request.key} of {request.name} are not in "
                    "this checkpoint; it belongs to another model or optimizer; check model.path and optimizer.name"
                )
        return copies


def _merge(
    copies: Sequence[_Copy], files: CheckedFiles
) -> Iterator[tuple[str, int, int, list[_Copy]]]:
    """Yield (path, first byte, last byte, copies) of requests that join neighbours; no block is read twice."""
    windows = {copy.path: files.window(copy.path, MAX_REQUEST_BYTES) for copy in copies}
    cut = [part for copy in copies for part in _cut(copy, windows[copy.path])]
    cut.sort(key=lambda copy: (copy.path, copy.start))
    for (path, _), inside in groupby(
        cut, lambda copy: (copy.path, copy.start // windows[copy.path])
    ):
        group: list[_Copy] = []
        last = 0
        for copy in inside:
            if group and copy.start > last + max(MAX_GAP_BYTES, files.window(path, 1)):
                yield path, group[0].start, last, group
                group = []
            group.append(copy)
            last = max(last, copy.stop)
        yield path, group[0].start, last, group


def _cut(copy: _Copy, window: int) -> Iterator[_Copy]:
    """Yield the parts of a copy that lie in different windows of its file."""
    start = copy.start
    while start < copy.stop:
        stop = min(copy.stop, (start // window + 1) * window)
        yield replace(copy, into=copy.into + start - copy.start, start=start, stop=stop)
        start = stop
