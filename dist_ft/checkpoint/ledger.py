"""The ledger: which samples each committed step consumed, written down as they were fed to the model.

Rows come from the batches themselves, not from the plan, so that comparing the two proves something. A segment is
written with each checkpoint and named in its manifest; segments outlive the checkpoints that retention removes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dist_ft.checkpoint.manifest import LedgerEntry, Manifest, checksum, entry
from dist_ft.data.batch import Batch
from dist_ft.errors import CheckpointError
from dist_ft.storage import Store

COLUMNS = ("step", "epoch", "lane", "sample", "first_token", "num_tokens")
FOLDER = "ledger"


class LedgerBuffer:
    """Rows of this worker since the last checkpoint."""

    def __init__(self) -> None:
        self._rows: list[np.ndarray] = []

    def add(self, step: int, epoch: int, batches: Sequence[Batch]) -> None:
        """Note the pieces of this worker's `batches` of one step."""
        for batch in batches:
            if len(batch.pieces):
                head = np.array([[step, epoch, batch.lane]], dtype=np.int64).repeat(len(batch.pieces), axis=0)
                self._rows.append(np.concatenate([head, batch.pieces], axis=1))

    def put_back(self, rows: np.ndarray) -> None:
        """Remember rows again that could not be committed."""
        self._rows.insert(0, rows)

    def take(self) -> np.ndarray:
        """Return the rows (n, 6) int64 so far and forget them."""
        rows, self._rows = self._rows, []
        return np.concatenate(rows) if rows else np.zeros((0, len(COLUMNS)), dtype=np.int64)


def write_segment(store: Store, start: int, stop: int, attempt: int, parts: Sequence[np.ndarray]) -> LedgerEntry:
    """Write the rows of all workers for steps [start, stop) and return the manifest's entry for them."""
    from safetensors.numpy import save

    rows = np.concatenate(list(parts))
    rows = rows[np.lexsort((rows[:, 4], rows[:, 3], rows[:, 2], rows[:, 0]))]
    content = save({"rows": np.ascontiguousarray(rows)})
    path = f"{FOLDER}/{start:09d}-{stop:09d}-a{attempt:04d}.safetensors"
    store.write(path, content)
    return LedgerEntry(start=start, stop=stop, file=entry(path, content))


def read_ledger(store: Store, manifest: Manifest) -> np.ndarray:
    """Return all rows (n, 6) of the committed history that `manifest` ends, in order of steps."""
    parts, reached = [np.zeros((0, len(COLUMNS)), dtype=np.int64)], 0
    for segment in manifest.ledger:
        content = store.read(segment.file.path)
        if len(content) != segment.file.num_bytes or checksum(content) != segment.file.checksum:
            raise CheckpointError(f"{store.shown(segment.file.path)}: altered since it was written; the history of "
                                  f"steps {segment.start} to {segment.stop} can not be proved")
        if segment.start != reached:
            raise CheckpointError(f"{store.shown(segment.file.path)}: begins at step {segment.start}, expected "
                                  f"{reached}; the history has a hole")
        parts.append(_rows(content, store.shown(segment.file.path)))
        reached = segment.stop
    if reached != manifest.progress.step:
        raise CheckpointError(f"{store.shown(FOLDER)}: ends at step {reached}, the checkpoint stands at step "
                              f"{manifest.progress.step}; the history has a hole")
    return np.concatenate(parts)


def _rows(content: bytes, where: str) -> np.ndarray:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        rows = load(content)["rows"]
    except (SafetensorError, KeyError) as error:
        raise CheckpointError(f"{where}: no ledger segment ({error}); the history can not be proved") from error
    if rows.dtype != np.int64 or rows.ndim != 2 or rows.shape[1] != len(COLUMNS):
        raise CheckpointError(f"{where}: {rows.dtype} rows of shape {rows.shape}, expected int64 (n, {len(COLUMNS)}); "
                              "the history can not be proved")
    return rows
