"""Reads fragments: (parameter name, flat offset, values), stored in safetensors files.

A worker writes the state slices it owns (`file_layout`). A reader in any world requests the slices
it has and gets the overlapping bytes. Each byte is read once, in a few merged requests, several at
a time, and is verified before it is returned (`checked_reads`). Neither side knows the other's
world size or ZeRO stage.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np

from dist_ft.checkpoint.checked_reads import ByteRange, CheckedBytes, CheckedFiles
from dist_ft.core.errors import CheckpointError, DistFtError
from dist_ft.core.json_documents import decode_json
from dist_ft.core.world import Collectives, World, raise_together

MAX_FILE_BYTES = 64 * 2**20
"""Largest size of the values in a file, which is written, verified and sent as a whole."""
MAX_REQUEST_BYTES = 16 * 2**20
"""Most bytes read at once."""
MAX_GAP_BYTES = 2**21
"""Ranges closer than this are read in one request."""
MAX_HEADER_BYTES = 2**27
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


class StateKey(NamedTuple):
    """A state of a parameter, for example ("lm_head.weight", "exp_avg")."""

    name: str
    key: str


@dataclass(frozen=True)
class FragmentLocation:
    """Where a fragment is stored.

    Attributes:
        offset: first element of the flattened parameter.
        numel: number of elements.
        start: first byte in the file.
    """

    path: str
    offset: int
    numel: int
    start: int
    dtype: np.dtype


FragmentIndex = dict[StateKey, list[FragmentLocation]]
"""The fragments of each state of each parameter."""


def read_index(files: CheckedFiles, paths: Sequence[str]) -> FragmentIndex:
    """Return the fragments in some of a checkpoint's files.

    Raises:
        CheckpointError: a file's header is invalid.
    """
    index: FragmentIndex = defaultdict(list)

    # 8 bytes are requested, but reads are widened to a block, which mostly has the whole header.
    ranges = [ByteRange(path, 0, min(files.num_bytes(path), 8)) for path in paths]
    starts = files.read_all(ranges)
    for path, start in zip(paths, starts, strict=True):
        for state, locations in _read_header(files, path, start).items():
            index[state].extend(locations)

    return index


def gather_index(files: CheckedFiles, world: World, collectives: Collectives) -> FragmentIndex:
    """Return the fragments in all files of a checkpoint.

    Each rank reads a share of the headers. A collective call.
    """
    paths = files.paths
    own_paths = [paths[i] for i in world.share(len(paths))]
    own: FragmentIndex = {}
    problem: DistFtError | None = None
    try:
        own = read_index(files, own_paths)
    except DistFtError as error:
        problem = error

    # Before the next collective call, which a rank with an error would not reach.
    raise_together(collectives, problem)

    index: FragmentIndex = defaultdict(list)
    for of_rank in collectives.all_gather(own):
        for state, locations in of_rank.items():
            index[state].extend(locations)

    return index


def _read_header(files: CheckedFiles, path: str, start: CheckedBytes) -> FragmentIndex:
    """Return the fragments in a file, given its first block."""
    num_bytes = files.num_bytes(path)
    try:
        # safetensors: 8 bytes with the length of the header, the header in JSON, then the values.
        # A checksum does not make a file trustworthy, so the length is bounded before it is used.
        length = 0
        if num_bytes >= 8:
            length = int.from_bytes(start.slice(0, 8), "little")
        if not 2 <= length <= min(num_bytes - 8, MAX_HEADER_BYTES):
            raise ValueError(f"header of {length} bytes in a file of {num_bytes}")

        whole = start
        if 8 + length > len(start.content):
            whole = files.read(path, 0, 8 + length)
        header = decode_json(bytes(whole.slice(8, 8 + length)))

        index: FragmentIndex = defaultdict(list)
        for label, info in dict(header).items():
            # The only entry of the format that is not a tensor.
            if label != "__metadata__":
                # The parameter's name comes last, as it may have a colon itself.
                key, offset, name = label.split(":", 2)
                location = _parse_location(path, label, offset, info, 8 + length, num_bytes)
                index[StateKey(name, key)].append(location)
        return index
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        # The text of a KeyError is only the key.
        reason = str(error)
        if isinstance(error, KeyError | RecursionError):
            reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(
            f"{files.redacted_url(path)}: not a valid fragment file ({reason}); it will not be "
            "loaded"
        ) from error


def _parse_location(
    path: str, label: str, offset: str, info: dict[str, Any], values_start: int, num_bytes: int
) -> FragmentLocation:
    """Return the location that a header entry describes.

    Args:
        path: the file.
        label: the entry's name.
        offset: first element of the flattened parameter, as in `label`.
        info: the entry.
        values_start: first byte after the header.
        num_bytes: length of the file.
    """
    start, stop = info["data_offsets"]
    dtype = _DTYPES[info["dtype"]]
    (numel,) = info["shape"]

    # isinstance would accept true and false.
    are_integers = all(type(number) is int for number in (start, stop, numel))
    if not (offset.isascii() and offset.isdigit() and are_integers):
        raise ValueError(f"{label}: offsets and sizes must be whole numbers from 0")

    is_inside = 0 <= start <= stop <= num_bytes - values_start
    if not is_inside or stop - start != numel * dtype.itemsize:
        raise ValueError(f"{label} is outside the file")
    return FragmentLocation(path, int(offset), numel, values_start + start, dtype)


@dataclass(frozen=True)
class FragmentRequest:
    """Requests elements [offset, offset + numel) of state `key` of parameter `name`.

    Attributes:
        index: the caller's number for this request.
    """

    index: int
    name: str
    key: str
    offset: int
    numel: int


class FragmentValues(NamedTuple):
    """The values (numel,) of one request."""

    request_index: int
    values: np.ndarray


@dataclass(frozen=True)
class _Copy:
    """Bytes [start, stop) of a file, for byte `target_start` of the values of request `index`."""

    index: int
    target_start: int
    path: str
    start: int
    stop: int
    dtype: np.dtype


@dataclass(frozen=True)
class _MergedRead:
    """One read from storage that serves several copies."""

    range: ByteRange
    copies: list[_Copy]


class FragmentReader:
    """Reads parts of parameters from the fragment files of one checkpoint."""

    def __init__(self, files: CheckedFiles, index: FragmentIndex | None = None) -> None:
        """Store the files and their index; default: all headers are read at the first request."""
        self._files = files
        self._index = index

    def redacted_url(self) -> str:
        """Return the URL of the checkpoint, without credentials."""
        return self._files.redacted_url()

    def keys(self) -> set[StateKey]:
        """Return all states in the checkpoint."""
        return set(self._load_index())

    def _load_index(self) -> FragmentIndex:
        if self._index is None:
            self._index = read_index(self._files, self._files.paths)
        return self._index

    def read(self, name: str, key: str, offset: int, numel: int) -> np.ndarray:
        """Return elements [offset, offset + numel); raises CheckpointError if any is missing."""
        return next(self.read_many([FragmentRequest(0, name, key, offset, numel)])).values

    def read_many(self, requests: Sequence[FragmentRequest]) -> Iterator[FragmentValues]:
        """Yield the values of each request once they are complete; valid until the next item.

        Raises:
            CheckpointError: requested elements are not in the checkpoint.
            DamagedError: the bytes differ from what was written; values read from them were not
                returned.
        """
        # All reads are planned before the first value is yielded: a checkpoint of another model
        # must not overwrite part of the caller's state.
        reads = list(_merge(self._plan_copies(requests), self._files))
        sizes = {request.index: request.numel for request in requests}
        incomplete: dict[int, np.ndarray] = {}
        missing_bytes: dict[int, int] = {}

        # Requests without elements have no copies, which would otherwise complete them.
        for request in requests:
            if request.numel == 0:
                yield FragmentValues(request.index, np.zeros(0, np.float32))

        contents = self._files.read_all([read.range for read in reads])
        for found, read in zip(contents, reads, strict=True):
            for copy in read.copies:
                content = np.frombuffer(found.slice(copy.start, copy.stop), np.uint8)
                is_whole_request = len(content) == sizes[copy.index] * copy.dtype.itemsize
                if is_whole_request:
                    # torch requires writable and aligned memory. Bytes of a local disk mostly are
                    # both, and need no copy.
                    values = content.view(copy.dtype)
                    if values.flags.aligned and values.flags.writeable:
                        yield FragmentValues(copy.index, values)
                        continue

                buffer = incomplete.get(copy.index)
                if buffer is None:
                    buffer = incomplete[copy.index] = np.empty(sizes[copy.index], copy.dtype)
                    missing_bytes[copy.index] = buffer.nbytes

                target = slice(copy.target_start, copy.target_start + len(content))
                buffer.view(np.uint8)[target] = content
                missing_bytes[copy.index] -= len(content)

                # Removed from `incomplete`, so that the values do not stay in memory to the end.
                if missing_bytes[copy.index] == 0:
                    yield FragmentValues(copy.index, incomplete.pop(copy.index))

    def _plan_copies(self, requests: Sequence[FragmentRequest]) -> list[_Copy]:
        """Return the overlaps of `requests` with the fragments.

        Raises CheckpointError if elements are missing.
        """
        index = self._load_index()
        copies: list[_Copy] = []
        for request in requests:
            stop = request.offset + request.numel
            next_element = request.offset
            fragments = index.get(StateKey(request.name, request.key), ())

            # In order of offsets, a gap shows at once, and elements that several fragments have are
            # taken from the first of them only.
            for fragment in sorted(fragments, key=lambda found: found.offset):
                first = max(next_element, fragment.offset)
                last = min(stop, fragment.offset + fragment.numel)
                if first > next_element:
                    break
                if last <= first:
                    continue

                itemsize = fragment.dtype.itemsize
                start = fragment.start + (first - fragment.offset) * itemsize
                copies.append(
                    _Copy(
                        request.index,
                        (first - request.offset) * itemsize,
                        fragment.path,
                        start,
                        start + (last - first) * itemsize,
                        fragment.dtype,
                    )
                )
                next_element = last

            if next_element < stop:
                raise CheckpointError(
                    f"{self._files.redacted_url()}: elements from {next_element} of {request.key} "
                    f"of {request.name} are not in this checkpoint. It belongs to another model or "
                    "optimizer. Check model.path and optimizer.name."
                )
        return copies


def _merge(copies: Sequence[_Copy], files: CheckedFiles) -> Iterator[_MergedRead]:
    """Merge neighboring copies into reads, so that no block is read twice."""
    window_bytes = {copy.path: files.window_bytes(copy.path, MAX_REQUEST_BYTES) for copy in copies}

    # Windows bound the size of a read. They consist of whole blocks, so two windows share none.
    split: list[_Copy] = []
    for copy in copies:
        split.extend(_split(copy, window_bytes[copy.path]))
    split.sort(key=lambda copy: (copy.path, copy.start))

    by_window = groupby(split, lambda copy: (copy.path, copy.start // window_bytes[copy.path]))
    for (path, _), in_window in by_window:
        group: list[_Copy] = []
        stop = 0
        # At least one block: two reads in the same block would both fetch it.
        max_gap = max(MAX_GAP_BYTES, files.window_bytes(path, 1))
        for copy in in_window:
            if group and copy.start > stop + max_gap:
                yield _MergedRead(ByteRange(path, group[0].start, stop), group)
                group = []

            group.append(copy)
            stop = max(stop, copy.stop)

        yield _MergedRead(ByteRange(path, group[0].start, stop), group)


def _split(copy: _Copy, window_bytes: int) -> Iterator[_Copy]:
    """Yield the parts of a copy that are in different windows of its file."""
    start = copy.start
    while start < copy.stop:
        stop = min(copy.stop, (start // window_bytes + 1) * window_bytes)
        target_start = copy.target_start + start - copy.start
        yield replace(copy, target_start=target_start, start=start, stop=stop)
        start = stop
