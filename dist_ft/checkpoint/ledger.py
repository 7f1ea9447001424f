"""The ledger: which samples each committed step consumed, written down as they were fed to the model.

Rows come from the batches themselves, not from the plan, so that comparing the two proves something. A segment is
written with each checkpoint and named in its manifest; segments outlive the checkpoints that retention removes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dist_ft.checkpoint.manifest import LedgerEntry, Manifest, compute_checksum, file_entry
from dist_ft.core.errors import CheckpointError
from dist_ft.data.batch import Batch
from dist_ft.storage.filesystem import Store

COLUMNS = ("step", "epoch", "lane", "sample", "first_token", "num_tokens")
FOLDER = "ledger"
DIFFERENCES = ("step", "sample")
MOST_BYTES = 2**32


class LedgerBuffer:
    """Rows of this worker since the last checkpoint."""

    def __init__(self) -> None:
        self._rows: list[np.ndarray] = []

    def add(self, step: int, batches: Sequence[Batch]) -> None:
        """Note the pieces of this worker's `batches` of one step."""
        for batch in batches:
            if len(batch.segments):
                lead = (
                    np.full(len(batch.segments), step),
                    batch.segments[:, 3],
                    np.full(len(batch.segments), batch.lane),
                )
                self._rows.append(np.column_stack([*lead, batch.segments[:, :3]]))

    def put_back(self, rows: np.ndarray) -> None:
        """Remember rows again that could not be committed."""
        self._rows.insert(0, rows)

    def take(self) -> np.ndarray:
        """Return the rows (n, 6) int64 so far and forget them."""
        rows = self.rows()
        self._rows = []
        return rows

    def rows(self) -> np.ndarray:
        """Return the rows (n, 6) int64 so far."""
        self._rows = [np.concatenate([np.zeros((0, len(COLUMNS)), dtype=np.int64), *self._rows])]
        return self._rows[0]


def write_segment(
    store: Store, start: int, stop: int, attempt: int, parts: Sequence[np.ndarray]
) -> LedgerEntry:
    """Write the rows of all workers for steps [start, stop) and return the manifest's entry for them."""
    rows = np.concatenate(list(parts))
    rows = rows[np.lexsort((rows[:, 4], rows[:, 3], rows[:, 2], rows[:, 0]))]
    content = pack_rows(rows)
    path = f"{FOLDER}/{start:09d}-{stop:09d}-a{attempt:04d}.safetensors.zst"
    store.write(path, content)
    return LedgerEntry(start=start, stop=stop, file=file_entry(path, content))


def read_ledger(store: Store, manifest: Manifest) -> np.ndarray:
    """Return all rows (n, 6) of the committed history that `manifest` ends, in order of steps."""
    parts, reached = [np.zeros((0, len(COLUMNS)), dtype=np.int64)], 0
    for segment in manifest.ledger:
        content = store.read(segment.file.path)
        if len(content) != segment.file.num_bytes or compute_checksum(content) != segment.file.checksum:
            raise CheckpointError(
                f"{store.shown(segment.file.path)}: altered since it was written; the history of "
                f"steps {segment.start} to {segment.stop} can not be proved"
            )
        if segment.start != reached:
            raise CheckpointError(
                f"{store.shown(segment.file.path)}: begins at step {segment.start}, expected "
                f"{reached}; the history has a hole"
            )
        parts.append(unpack_rows(content, store.shown(segment.file.path)))
        reached = segment.stop
    if reached != manifest.progress.step:
        raise CheckpointError(
            f"{store.shown(FOLDER)}: ends at step {reached}, the checkpoint stands at step "
            f"{manifest.progress.step}; the history has a hole"
        )
    return np.concatenate(parts)


def pack_rows(rows: np.ndarray) -> bytes:
    """Return rows (n, 6) int64, sorted by step, as a compressed safetensors file: some 4 to 8 bytes a row.

    Columns lie apart and as narrow as they can be; samples as differences to the row before.
    """
    import pyarrow
    from safetensors.numpy import save

    columns = {name: rows[:, i].copy() for i, name in enumerate(COLUMNS)}
    for name in DIFFERENCES:
        columns[name] = np.diff(columns[name], prepend=0)
    plain = save({name: _narrow(values) for name, values in columns.items()})
    return len(plain).to_bytes(8, "little") + pyarrow.Codec("zstd").compress(plain, asbytes=True)


def _narrow(values: np.ndarray) -> np.ndarray:
    """Return whole numbers in the smallest type that holds them."""
    least, most = (int(values.min()), int(values.max())) if len(values) else (0, 0)
    return values.astype(
        next(
            kind
            for kind in (np.int8, np.int16, np.int32, np.int64)
            if np.iinfo(kind).min <= least and most <= np.iinfo(kind).max
        )
    )


def unpack_rows(content: bytes, where: str) -> np.ndarray:
    """Return the rows (n, 6) int64 that `pack_rows` packed; raises CheckpointError that names `where`."""
    import pyarrow
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        size = int.from_bytes(content[:8], "little")
        if size > MOST_BYTES:
            raise ValueError(f"{size} bytes")
        columns = load(pyarrow.Codec("zstd").decompress(content[8:], size, asbytes=True))
        for name in DIFFERENCES:
            columns[name] = np.cumsum(columns[name], dtype=np.int64)
        return np.column_stack([columns[name].astype(np.int64) for name in COLUMNS])
    except (SafetensorError, KeyError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{where}: no ledger segment ({error}); the history can not be proved"
        ) from error
