"""The ledger records which samples each committed step trained on.

Rows are taken from the batches themselves, not from the plan, so that comparing the two is a real
check. Each checkpoint writes one segment and names it in its manifest; segments outlive the
checkpoints that retention removes. Segments of a streamed run also say what the slices hold that
were read: no index does.

A ledger row has six int64 columns, see COLUMNS, and that of a slice five, see SLICE_COLUMNS. N is
the number of rows, M that of slices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dist_ft.checkpoint import attempts
from dist_ft.checkpoint.manifest import LedgerEntry, Manifest, compute_checksum, file_entry
from dist_ft.core.errors import CheckpointError
from dist_ft.data.batch import Batch
from dist_ft.storage.documents import MAX_LARGE_BYTES
from dist_ft.storage.filesystem import Store

COLUMNS = ("step", "epoch", "lane", "sample", "first_token", "num_tokens")
SLICE_COLUMNS = ("slice", "num_rows", "num_bad", "num_segments", "checksum")
"""Number of a slice over all sources, what it holds, and 63 bits of the checksum of its tokens."""
FOLDER = attempts.LEDGER
DELTA_COLUMNS = ("step", "sample")
"""Columns stored as the difference to the row before."""
SLICE_PREFIX = "slices."
PART_BYTES = 2**24
"""Bytes that are decompressed at a time."""
MAX_BYTES = 2**32
"""Largest segment, uncompressed, that is read."""


NO_SLICES = np.zeros((0, len(SLICE_COLUMNS)), dtype=np.int64)


class LedgerRows(NamedTuple):
    """Rows of a ledger.

    Attributes:
        samples: int64 (N, 6), see COLUMNS.
        slices: int64 (M, 5), see SLICE_COLUMNS; those of an indexed run are none.
    """

    samples: np.ndarray
    slices: np.ndarray = NO_SLICES

    @classmethod
    def concatenate(cls, parts: Sequence[LedgerRows]) -> LedgerRows:
        """Return the rows of all parts."""
        # Starts with arrays without rows: there may be no part, and concatenate needs an array.
        samples = [np.zeros((0, len(COLUMNS)), dtype=np.int64)]
        slices = [NO_SLICES]
        for part in parts:
            samples.append(part.samples)
            slices.append(part.slices)
        return cls(np.concatenate(samples), np.concatenate(slices))


class LedgerBuffer:
    """The rows of this worker since the last checkpoint."""

    def __init__(self) -> None:
        self._parts: list[LedgerRows] = []

    def add(self, step: int, batches: Sequence[Batch], slices: np.ndarray = NO_SLICES) -> None:
        """Record the segments of this worker's `batches` of one step, and slices (M, 5)."""
        rows: list[np.ndarray] = [np.zeros((0, len(COLUMNS)), dtype=np.int64)]
        for batch in batches:
            num_segments = len(batch.segments)
            if not num_segments:
                continue

            # batch.segments: (S, 4) sample, first token, number of tokens, epoch
            leading_columns = (
                np.full(num_segments, step),
                batch.segments[:, 3],
                np.full(num_segments, batch.lane),
            )
            rows.append(np.column_stack([*leading_columns, batch.segments[:, :3]]))
        self._parts.append(LedgerRows(np.concatenate(rows), slices))

    def restore(self, rows: LedgerRows) -> None:
        """Put back rows that could not be committed, in front of the others."""
        self._parts.insert(0, rows)

    def take(self) -> LedgerRows:
        """Return the rows so far, and clear the buffer."""
        rows = self.rows()
        self._parts = []
        return rows

    def rows(self) -> LedgerRows:
        """Return the rows so far."""
        # Kept as one part: rows are requested again at each local checkpoint, which does not clear
        # the buffer.
        self._parts = [LedgerRows.concatenate(self._parts)]
        return self._parts[0]


def write_segment(
    store: Store, start: int, stop: int, attempt: int, rows_by_worker: Sequence[LedgerRows]
) -> LedgerEntry:
    """Write the rows of all workers for steps [start, stop); return the manifest entry."""
    rows, slices = LedgerRows.concatenate(rows_by_worker)

    # Sorted, a segment does not depend on the number of workers, and neighboring rows differ
    # little. lexsort takes the most significant key last.
    by_step_lane_and_sample = np.lexsort((rows[:, 4], rows[:, 3], rows[:, 2], rows[:, 0]))
    # A worker that took over a lane may have read a slice that another one had read.
    content = pack_rows(LedgerRows(rows[by_step_lane_and_sample], np.unique(slices, axis=0)))

    path = f"{FOLDER}/{start:09d}-{stop:09d}-a{attempt:04d}.safetensors.zst"
    store.write(path, content)
    return LedgerEntry(start=start, stop=stop, file=file_entry(path, content))


def read_ledger(store: Store, manifest: Manifest) -> np.ndarray:
    """Return the rows (N, 6) of all samples; see `read_history`."""
    return read_history(store, manifest).samples


def read_history(store: Store, manifest: Manifest) -> LedgerRows:
    """Return all rows, in order of steps, of the history that `manifest` ends.

    Raises:
        CheckpointError: a segment is damaged or missing.
    """
    segments = []
    next_step = 0
    for segment in manifest.ledger:
        rows = read_segment(store, segment)
        if segment.start != next_step:
            raise CheckpointError(
                f"{store.redacted_url(segment.file.path)}: starts at step {segment.start}, "
                f"expected {next_step}. The history has a gap. Restore the ledger from a copy."
            )

        segments.append(rows)
        next_step = segment.stop

    if next_step != manifest.progress.step:
        raise CheckpointError(
            f"{store.redacted_url(FOLDER)}: ends at step {next_step}, the checkpoint is at step "
            f"{manifest.progress.step}. The history has a gap. Restore the ledger from a copy."
        )
    return LedgerRows.concatenate(segments)


def read_segment(store: Store, segment: LedgerEntry) -> LedgerRows:
    """Return the rows of one segment.

    Raises:
        StorageError: it is missing, or the storage does not respond.
        CheckpointError: it is damaged.
    """
    where = store.redacted_url(segment.file.path)
    content = store.read_at_most(segment.file.path, MAX_LARGE_BYTES)
    is_intact = (
        len(content) == segment.file.num_bytes
        and compute_checksum(content) == segment.file.checksum
    )
    if not is_intact:
        raise CheckpointError(
            f"{where}: altered since it was written. The history of steps {segment.start} to "
            f"{segment.stop} cannot be verified. Restore the file from a copy."
        )
    return unpack_rows(content, where)


def pack_rows(rows: LedgerRows) -> bytes:
    """Return rows, sorted by step, as compressed safetensors: 4 to 8 bytes a sample.

    Each column is a tensor of the narrowest type that holds it; samples and steps are stored as
    differences.
    """
    import pyarrow
    from safetensors.numpy import save

    columns = {name: rows.samples[:, i].copy() for i, name in enumerate(COLUMNS)}

    # With 0 in front, the first value is kept, and `cumsum` restores all of them.
    for name in DELTA_COLUMNS:
        columns[name] = np.diff(columns[name], prepend=0)

    # An indexed run has none: its segments stay as earlier versions wrote them.
    if len(rows.slices):
        for i, name in enumerate(SLICE_COLUMNS):
            columns[f"{SLICE_PREFIX}{name}"] = rows.slices[:, i]

    # `_narrow` also makes the columns contiguous: safetensors ignores strides.
    plain = save({name: _narrow(values) for name, values in columns.items()})

    # The length comes first, since pyarrow has to know it to decompress.
    return len(plain).to_bytes(8, "little") + pyarrow.Codec("zstd").compress(plain, asbytes=True)


def _narrow(values: np.ndarray) -> np.ndarray:
    """Return integers in the smallest type that holds them."""
    smallest, largest = 0, 0
    if len(values):
        smallest, largest = int(values.min()), int(values.max())

    for dtype in (np.int8, np.int16, np.int32):
        if np.iinfo(dtype).min <= smallest and largest <= np.iinfo(dtype).max:
            return values.astype(dtype)
    return values.astype(np.int64)


def _decompress(content: bytes, num_bytes: int) -> bytes:
    """Return the `num_bytes` bytes that zstd compressed to `content`.

    Raises:
        ValueError, OSError: it holds fewer or more bytes, or is damaged.
    """
    import pyarrow

    # In parts: a damaged file may state any number, and memory of that size is allocated only as
    # bytes come.
    stream = pyarrow.CompressedInputStream(pyarrow.BufferReader(content), "zstd")
    parts: list[bytes] = []
    num_left = num_bytes
    while num_left:
        part = stream.read(min(num_left, PART_BYTES))
        if not part:
            raise ValueError(f"{num_left:,} of {num_bytes:,} bytes are missing")
        parts.append(part)
        num_left -= len(part)

    if stream.read(1):
        raise ValueError(f"more than {num_bytes:,} bytes")
    return b"".join(parts)


def unpack_rows(content: bytes, where: str) -> LedgerRows:
    """Return the rows that `pack_rows` packed.

    Raises:
        CheckpointError: `content` is not a valid segment; the message names `where`.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        # Before memory of that size is allocated: the file may be hostile.
        num_bytes = int.from_bytes(content[:8], "little")
        if num_bytes > MAX_BYTES:
            raise ValueError(f"{num_bytes} bytes")

        columns = load(_decompress(content[8:], num_bytes))
        for name in DELTA_COLUMNS:
            columns[name] = np.cumsum(columns[name], dtype=np.int64)

        samples = np.column_stack([columns[name].astype(np.int64) for name in COLUMNS])

        slices = NO_SLICES
        if f"{SLICE_PREFIX}{SLICE_COLUMNS[0]}" in columns:
            values = [columns[f"{SLICE_PREFIX}{name}"] for name in SLICE_COLUMNS]
            slices = np.column_stack([column.astype(np.int64) for column in values])
        return LedgerRows(samples, slices)
    except (SafetensorError, KeyError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{where}: not a valid ledger segment ({error}). The history cannot be verified. "
            "Restore the file from a copy."
        ) from error
