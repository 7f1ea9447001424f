"""Samples to pieces: what becomes of a sample that is longer than a sequence.

Pure. A piece is a run of tokens of one sample that fits into a sequence; most samples are one piece. Pieces with
nothing to learn are left out. Cuts by `data.overlong`: truncate keeps the start, drop keeps nothing, split goes on in
further pieces (which costs one target a cut: the first token of a piece has nothing before it to be told from).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dist_ft.data.cache import TokenisedShard
from dist_ft.data.source import Shard
from dist_ft.errors import DataError
from dist_ft.logs import redact


@dataclass(frozen=True)
class Measures:
    """The numbers of one shard of n rows; the arrays are those of `Index`, with rows in place of sample ids.

    Attributes:
        lengths: (n,) int32 tokens a row.
        target_counts: (n,) int32 learned tokens a row.
        pieces: (P, 3) int64 [row, first token, number of tokens].
        piece_targets: (P,) int32 targets a piece.
        format: chat, instruction or text.
    """

    lengths: np.ndarray
    target_counts: np.ndarray
    pieces: np.ndarray
    piece_targets: np.ndarray
    format: str


def measure(shard: TokenisedShard, sequence_length: int, overlong: str) -> Measures:
    """Return lengths and pieces of a tokenised shard; under overlong=error it is cut as for truncate (see `judge`)."""
    lengths = np.diff(shard.offsets)
    learned = np.concatenate([[0], np.cumsum(shard.targets, dtype=np.int64)])
    rows, first, size = cut(lengths, sequence_length, overlong)
    start = shard.offsets[:-1][rows] + first
    targets = learned[start + size] - learned[np.minimum(start + 1, start + size)]
    kept = targets > 0
    return Measures(lengths.astype(np.int32), np.diff(learned[shard.offsets]).astype(np.int32),
                    np.stack([rows, first, size], axis=1)[kept], targets[kept].astype(np.int32), shard.format)


def cut(lengths: np.ndarray, sequence_length: int, overlong: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return row, first token and number of tokens, each int64 (P,), of the pieces of rows of `lengths` (n,)."""
    lengths = lengths.astype(np.int64)
    counts = (lengths > 0).astype(np.int64)
    if overlong == "drop":
        counts *= lengths <= sequence_length
    elif overlong == "split":
        counts = -(-lengths // sequence_length)
    rows = np.repeat(np.arange(len(lengths)), counts)
    turn = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    first = turn * sequence_length
    return rows, first, np.minimum(lengths[rows] - first, sequence_length)


def judge(lengths: np.ndarray, formats: Sequence[str], shards: Sequence[Shard], row_offsets: np.ndarray,
          sequence_length: int, overlong: str) -> None:
    """Refuse samples that are too long where the policy does not say what to do with them.

    Raises:
        DataError: under `error` any, under `split` one that is not plain text; names the longest.
    """
    plain = np.repeat(np.array([kind == "text" for kind in formats], dtype=bool), np.diff(row_offsets))
    refused = (lengths > sequence_length) & (~plain if overlong == "split" else overlong == "error")
    if not refused.any():
        return
    longest = int(np.argmax(np.where(refused, lengths, 0)))
    shard = int(np.searchsorted(row_offsets, longest, side="right")) - 1
    what = "samples" if overlong == "error" else "samples that are not plain text"
    ways = "data.overlong=truncate or drop" + (", or split for text," if overlong == "error" else "")
    raise DataError(redact(
        f"data.overlong={overlong}: {int(refused.sum())} of {len(lengths)} {what} are longer than "
        f"batch.sequence_length={sequence_length} (longest {lengths[longest]} tokens, {shards[shard].url} row "
        f"{longest - row_offsets[shard] + 1}); set {ways} or raise batch.sequence_length"))
