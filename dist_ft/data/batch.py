"""The type that travels from `data` to `engine`: `Batch`.

Dimensions: B sequences (rows) of T tokens; N segments; R rows that hold a sequence.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

IGNORE_INDEX = -100
"""Target id of positions without a target (the `ignore_index` of torch's cross-entropy)."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch: B sequences of T tokens, where T is the length of the longest.

    Attributes:
        input_ids: (B, T) int64, padded with 0.
        target_ids: (B, T) int64: the next token of the same sample, or `IGNORE_INDEX`.
        position_ids: (B, T) int64: restarts at 0 with each sample of a packed sequence, and in the
            padding.
        segments: (N, 4) int64 [sample id, first token, number of tokens, epoch] of each segment
            in the batch, as stored in the data.
        lane: its place in the global batch; -1 for an empty batch that only keeps ranks in step.
        row_sources: (R, 2) int64 [source, number of tokens] of each row that holds a sequence.
        changed_lengths: (N,) int64 tokens of each segment in this batch, where augmentation may
            have changed them; None: as in `segments`.
    """

    input_ids: np.ndarray
    target_ids: np.ndarray
    position_ids: np.ndarray
    segments: np.ndarray
    lane: int
    row_sources: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), dtype=np.int64))
    changed_lengths: np.ndarray | None = None

    @property
    def num_target_tokens(self) -> int:
        """The number of positions with a target."""
        return int((self.target_ids != IGNORE_INDEX).sum())

    @property
    def num_tokens(self) -> int:
        """The number of positions that hold a token of a sample (not padding)."""
        return int(self.segment_lengths.sum())

    @property
    def segment_lengths(self) -> np.ndarray:
        """Tokens of each segment in this batch, (N,)."""
        if self.changed_lengths is not None:
            return self.changed_lengths
        return self.segments[:, 2]


class BadRows(NamedTuple):
    """Rows that could not be used.

    Attributes:
        num_rows: their number.
        first: what was wrong with the first of them; "" without any.
    """

    num_rows: int = 0
    first: str = ""

    def plus(self, other: BadRows) -> BadRows:
        """Return these rows and later ones."""
        return BadRows(self.num_rows + other.num_rows, self.first or other.first)


def empty_batch(lane: int = -1, length: int = 8) -> Batch:
    """Return a batch of one sequence without targets: its loss has weight zero."""
    # It has a real shape, as every rank must run the same number of forward and backward passes:
    # their collective calls would otherwise hang.
    zeros = np.zeros((1, length), dtype=np.int64)

    return Batch(
        input_ids=zeros,
        target_ids=np.full_like(zeros, IGNORE_INDEX),
        position_ids=np.arange(length, dtype=np.int64)[None, :],
        # no segments: the ledger of samples must not count it
        segments=np.zeros((0, 4), dtype=np.int64),
        lane=lane,
    )
