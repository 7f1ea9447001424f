"""Which tokens a masked language model must tell: drawn by seed, epoch and sample, so the same in every world.

Of the tokens chosen 80 % become the mask, 10 % another token, 10 % stay (BERT, arXiv:1810.04805); at least one is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from dist_ft.config.schema import TaskSection
from dist_ft.core.seeds import (
    derive_seed,
    random_uint64,
)
from dist_ft.data.batch import IGNORE_INDEX

MASKED, REPLACED = 0.8, 0.9


@dataclass(frozen=True)
class Masking:
    """How masks are drawn.

    Attributes:
        mask: id of the mask token.
        vocabulary: number of ids.
        share: of the tokens that are to be told.
        seed: of the run.
    """

    mask: int
    vocabulary: int
    share: float
    seed: int

    @classmethod
    def of(cls, tokenizer: Any, task: TaskSection, seed: int) -> Masking:
        """Return the masking of a task."""
        return cls(tokenizer.mask_token_id, len(tokenizer), task.mask_probability, seed)

    def apply(
        self, tokens: np.ndarray, labels: np.ndarray, segments: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return tokens and labels of a batch with what is masked.

        Args:
            tokens: (sum,) of all pieces.
            labels: (sum,) int32: the token itself where it may be masked, else IGNORED.
            pieces: (n, 4) [sample id, first token, number of tokens, epoch].
        """
        drawn = np.concatenate(
            [
                random_uint64(derive_seed(self.seed, epoch, sample, first), size)
                for sample, first, size, epoch in segments.tolist()
            ]
        )
        chance = (drawn >> np.uint64(11)).astype(np.float64) / 2**53
        chance[labels == IGNORE_INDEX] = 2.0
        starts = np.cumsum(segments[:, 2]) - segments[:, 2]
        least = np.repeat(np.minimum.reduceat(chance, starts), segments[:, 2])
        chosen = (chance < self.share) | ((chance == least) & (least < 2))
        how = np.where(
            chance < self.share, chance / self.share, 0.0
        )  # one that had to be chosen is masked
        found = np.where(chosen & (how < MASKED), self.mask, tokens)
        others = (drawn % np.uint64(self.vocabulary)).astype(np.int64)
        found = np.where(chosen & (how >= MASKED) & (how < REPLACED), others, found)
        return found.astype(tokens.dtype), np.where(chosen, labels, np.int32(IGNORE_INDEX)).astype(
            np.int32
        )
