"""Plans fragment files and builds their content in host memory with one copy of the state.

A layout states where the elements of which state slice are in a file. It depends on the slices
only, so that the same buffers serve every save of a run. The files are plain safetensors. This
module does not write to storage.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dist_ft.checkpoint import fragments
from dist_ft.core.errors import CheckpointError
from dist_ft.engine.base import StateSlice

_STORED_AS = {torch.bfloat16: torch.float32}
"""Types that numpy does not have, and an exact replacement."""
_DTYPE_NAMES = {
    torch.float32: "F32",
    torch.float64: "F64",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


ALIGNMENT = 64
"""Bytes of a cache line. Copying values that do not start on one is almost twice as slow."""


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a fragment file: elements [first, first + numel) of a state slice.

    Attributes:
        slice_index: the state slice, in the sequence that the layout was planned for.
        dtype: the type in the file.
        label: the name in the file: "key:offset:parameter name".
    """

    slice_index: int
    first: int
    numel: int
    dtype: torch.dtype
    label: str

    @property
    def num_bytes(self) -> int:
        """The size in the file."""
        return self.numel * self.dtype.itemsize

    def select(self, state: Sequence[StateSlice]) -> torch.Tensor:
        """Return the values (numel,) of this entry."""
        values = state[self.slice_index].read().detach()
        return values[self.first : self.first + self.numel]


@dataclass(frozen=True)
class FileLayout:
    """One file: its header, then the bytes of its entries without gaps."""

    header: bytes
    entries: tuple[TensorEntry, ...]

    @property
    def num_bytes(self) -> int:
        """The length of the file."""
        return len(self.header) + sum(entry.num_bytes for entry in self.entries)

    def copy_into(self, state: Sequence[StateSlice], content: torch.Tensor) -> None:
        """Write the file to `content` (num_bytes,) uint8.

        Copies from a GPU may still be running on return.
        """
        # frombuffer warns about bytes, which must not be written to; a bytearray is a copy.
        start = len(self.header)
        content[:start] = torch.frombuffer(bytearray(self.header), dtype=torch.uint8)
        for entry in self.entries:
            # A view as a wider type is possible since every value is aligned (`_plan_file`).
            target = content[start : start + entry.num_bytes].view(entry.dtype)
            target.copy_(entry.select(state), non_blocking=True)
            start += entry.num_bytes

    def as_buffers(self, state: Sequence[StateSlice]) -> list[memoryview]:
        """Return the content of the file as a list of buffers.

        Values that are in host memory in the stored type are not copied, so they must not change
        until the file is written.
        """
        buffers = [memoryview(self.header)]
        for entry in self.entries:
            # `to` and `contiguous` return the same memory where nothing has to change.
            values = entry.select(state).to("cpu", entry.dtype).contiguous()
            buffers.append(memoryview(values.numpy().view(np.uint8)))  # type: ignore[arg-type]

        return buffers


def plan_files(state: Sequence[StateSlice], first: int = 0) -> list[FileLayout]:
    """Return the files that hold the state slices from index `first` on.

    A file has at most MAX_FILE_BYTES of values; larger slices are split.

    Raises:
        CheckpointError: a slice has a type that safetensors cannot store.
    """
    files: list[list[TensorEntry]] = []
    num_bytes = 0
    for entry in _plan_entries(state, first):
        if not files or num_bytes + entry.num_bytes > fragments.MAX_FILE_BYTES:
            files.append([])
            num_bytes = 0

        files[-1].append(entry)
        num_bytes += entry.num_bytes

    return [_plan_file(entries) for entries in files]


def _plan_entries(state: Sequence[StateSlice], start: int) -> Iterator[TensorEntry]:
    for index, part in enumerate(state[start:], start):
        dtype_in_memory = part.read().dtype
        dtype = _STORED_AS.get(dtype_in_memory, dtype_in_memory)
        if dtype not in _DTYPE_NAMES:
            allowed = ", ".join(str(known) for known in (*_DTYPE_NAMES, *_STORED_AS))
            raise CheckpointError(
                f"{part.key} of {part.name}: values of type {dtype_in_memory} cannot be saved. "
                f"Allowed: {allowed}. Convert them to one of these types."
            )

        max_elements = max(1, fragments.MAX_FILE_BYTES // dtype.itemsize)

        # An empty slice has an entry too: a reader must find all states that the model has.
        for first in range(0, max(1, part.numel), max_elements):
            numel = min(max_elements, part.numel - first)
            label = f"{part.key}:{part.offset + first}:{part.name}"
            yield TensorEntry(index, first, numel, dtype, label)


def _plan_file(entries: Sequence[TensorEntry]) -> FileLayout:
    """Return the file of `entries`, widest types first so that every value is aligned."""
    # Each width is a multiple of the next, and the format allows no gaps between values.
    ordered = sorted(entries, key=lambda entry: -entry.dtype.itemsize)

    header = {}
    start = 0
    for entry in ordered:
        header[entry.label] = {
            "dtype": _DTYPE_NAMES[entry.dtype],
            "shape": [entry.numel],
            "data_offsets": [start, start + entry.num_bytes],
        }
        start += entry.num_bytes

    # The format allows spaces after the header. 8 bytes are those of its length.
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return FileLayout(len(text).to_bytes(8, "little") + text, tuple(ordered))
