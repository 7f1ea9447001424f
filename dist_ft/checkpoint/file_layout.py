"""Fragment files as they will lie in storage, made in host memory by one copy of the state.

A layout says which elements of which slot stand where in a file; it follows from the slots alone, so its buffers serve
every save of a run. The files are plain safetensors. Does not write to storage.
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

_STORED = {torch.bfloat16: torch.float32}  # numpy lacks it; exact
_CODES = {
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
"""Bytes a cache line has: values that do not begin on one are copied at little more than half the speed."""


@dataclass(frozen=True)
class TensorEntry:
    """Elements [first, first + numel) of slot number `slot`, stored as `dtype`."""

    slot: int
    first: int
    numel: int
    dtype: torch.dtype
    label: str

    @property
    def num_bytes(self) -> int:
        """Return its size in the file."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class FileLayout:
    """One file: its header, then the bytes of its pieces without gaps."""

    header: bytes
    pieces: tuple[TensorEntry, ...]

    @property
    def num_bytes(self) -> int:
        """Return the length of the file."""
        return len(self.header) + sum(piece.num_bytes for piece in self.pieces)

    def fill(self, slots: Sequence[StateSlice], content: torch.Tensor | None = None) -> torch.Tensor:
        """Return the file (num_bytes,) uint8, made in `content` if given; copies from a GPU may still be under way."""
        if content is None:
            content = torch.empty(self.num_bytes, dtype=torch.uint8)
        start = len(self.header)
        content[:start] = torch.frombuffer(bytearray(self.header), dtype=torch.uint8)
        for piece in self.pieces:
            values = slots[piece.slot].read().detach()[piece.first : piece.first + piece.numel]
            content[start : start + piece.num_bytes].view(piece.dtype).copy_(
                values, non_blocking=True
            )
            start += piece.num_bytes
        return content

    def parts(self, slots: Sequence[StateSlice]) -> list[memoryview]:
        """Return the file in parts; nothing is copied that lies in host memory as it is stored: it must not change."""
        found = [memoryview(self.header)]
        for piece in self.pieces:
            values = slots[piece.slot].read().detach()[piece.first : piece.first + piece.numel]
            plain = values.to("cpu", piece.dtype).contiguous().numpy().view(np.uint8)
            found.append(memoryview(plain))  # type: ignore[arg-type]
        return found


def plan_files(slots: Sequence[StateSlice], first: int = 0) -> list[FileLayout]:
    """Return the files that hold `slots` from number `first` on, at most PART_BYTES of values each; larger are cut.

    Raises CheckpointError for numbers that no file can hold.
    """
    parts: list[list[TensorEntry]] = []
    size = 0
    for piece in _pieces(slots, first):
        if not parts or size + piece.num_bytes > fragments.MAX_FILE_BYTES:
            parts.append([])
            size = 0
        parts[-1].append(piece)
        size += piece.num_bytes
    return [_layout(part) for part in parts]


def _pieces(slots: Sequence[StateSlice], start: int) -> Iterator[TensorEntry]:
    for index, slot in enumerate(slots[start:], start):
        held = slot.read().dtype
        dtype = _STORED.get(held, held)
        if dtype not in _CODES:
            raise CheckpointError(
                f"{slot.key} of {slot.name}: numbers of the type {held} can not be saved; allowed "
                f"are {', '.join(str(known) for known in (*_CODES, *_STORED))}"
            )
        most = max(1, fragments.MAX_FILE_BYTES // dtype.itemsize)
        for first in range(0, max(1, slot.numel), most):
            label = f"{slot.key}:{slot.offset + first}:{slot.name}"
            yield TensorEntry(index, first, min(most, slot.numel - first), dtype, label)


def _layout(pieces: Sequence[TensorEntry]) -> FileLayout:
    """Return the file of `pieces`; the widest numbers first, so that all lie on multiples of their width."""
    ordered = sorted(pieces, key=lambda piece: -piece.dtype.itemsize)
    header, start = {}, 0
    for piece in ordered:
        header[piece.label] = {
            "dtype": _CODES[piece.dtype],
            "shape": [piece.numel],
            "data_offsets": [start, start + piece.num_bytes],
        }
        start += piece.num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return FileLayout(len(text).to_bytes(8, "little") + text, tuple(ordered))
