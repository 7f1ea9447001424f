"""The types that travel from `data` to `engine`: `Batch` and what it is made of."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

IGNORED = -100
"""Target id of positions that are not learned (the `ignore_index` of torch's cross-entropy)."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch: B sequences of T tokens, T being the longest of them.

    Attributes:
        input_ids: (B, T) int64, padded with 0.
        target_ids: (B, T) int64: the token that follows within the same sample, or `IGNORED`.
        position_ids: (B, T) int64, starting again at 0 with each sample of a packed sequence, and in the padding.
        pieces: (N, 4) int64: sample id, first token, number of tokens and epoch of every piece of a sample in here.
        lane: the place in the global batch; -1 for an empty batch that only keeps ranks in step.
        sources: (R, 2) int64: source and number of tokens of every row that holds a sequence.
        sizes: (N,) int64: tokens of every piece as it lies here, if it was changed since it was read; None: as read.
    """

    input_ids: np.ndarray
    target_ids: np.ndarray
    position_ids: np.ndarray
    pieces: np.ndarray
    lane: int
    sources: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), dtype=np.int64))
    sizes: np.ndarray | None = None

    @property
    def num_target_tokens(self) -> int:
        """How many positions are learned."""
        return int((self.target_ids != IGNORED).sum())

    @property
    def num_tokens(self) -> int:
        """How many positions hold a token of a sample (not padding)."""
        return int(self.held.sum())

    @property
    def held(self) -> np.ndarray:
        """Tokens of every piece as it lies here, (N,)."""
        return self.pieces[:, 2] if self.sizes is None else self.sizes


def empty_batch(lane: int = -1, length: int = 8) -> Batch:
    """Return a batch of one sequence with nothing to learn: weight zero, so it changes no gradient."""
    zeros = np.zeros((1, length), dtype=np.int64)
    positions = np.arange(length, dtype=np.int64)[None, :]
    return Batch(
        zeros, np.full_like(zeros, IGNORED), positions, np.zeros((0, 4), dtype=np.int64), lane
    )
