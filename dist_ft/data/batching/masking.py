"""Masking: which tokens a masked language model must predict.

Drawn by seed, epoch and sample, so the same in every world size. Of the selected tokens, 80 %
become the mask token, 10 % another token, and 10 % stay as they are (BERT, arXiv:1810.04805). At
least one token of each segment is selected.

N is the number of segments of a batch, L the sum of their tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from dist_ft.config.schema import TaskSection
from dist_ft.core.seeds import derive_seed, random_uint64, to_unit_interval
from dist_ft.data.batch import IGNORE_INDEX

MASKED_BELOW = 0.8
"""Selected tokens whose draw lies below this become the mask token,"""
REPLACED_BELOW = 0.9
"""the others below this another token, and the rest stay."""


class MaskedTokens(NamedTuple):
    """The tokens of a batch with masks.

    Attributes:
        tokens: (L,) token ids.
        labels: int32 (L,): the original token where one was selected, else `IGNORE_INDEX`.
    """

    tokens: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Masking:
    """How masks are drawn.

    Attributes:
        mask_id: id of the mask token.
        vocab_size: number of token ids.
        probability: probability that a token is selected.
        seed: seed of the run.
    """

    mask_id: int
    vocab_size: int
    probability: float
    seed: int

    @classmethod
    def from_task(cls, tokenizer: Any, task: TaskSection, seed: int) -> Masking:
        """Return the masking of a task."""
        return cls(tokenizer.mask_token_id, len(tokenizer), task.mask_probability, seed)

    def apply(self, tokens: np.ndarray, labels: np.ndarray, segments: np.ndarray) -> MaskedTokens:
        """Mask the tokens of a batch.

        Args:
            tokens: (L,) of all segments.
            labels: int32 (L,): the token itself where it may be masked, else `IGNORE_INDEX`.
            segments: (N, 4) [sample id, first token, number of tokens, epoch].
        """
        # One seed for each segment, so that its masks do not depend on the batch it is in.
        segment_draws = []
        for sample, first, size, epoch in segments.tolist():
            segment_seed = derive_seed(self.seed, epoch, sample, first)
            segment_draws.append(random_uint64(segment_seed, size))
        draws = np.concatenate(segment_draws)  # (L,)

        chance = to_unit_interval(draws)  # (L,)
        chance[labels == IGNORE_INDEX] = 2.0  # never selected

        # Select by probability, and the token with the smallest draw of each segment: one without
        # a target would add nothing to the loss. (A smallest draw of 2: no token may be masked.)
        lengths = segments[:, 2]
        starts = np.cumsum(lengths) - lengths
        smallest = np.repeat(np.minimum.reduceat(chance, starts), lengths)
        by_chance = chance < self.probability
        selected = by_chance | ((chance == smallest) & (smallest < 2))

        # The draw also decides what a selected token becomes. One that is selected only because it
        # has the smallest draw becomes the mask.
        kind = np.where(by_chance, chance / self.probability, 0.0)
        is_masked = selected & (kind < MASKED_BELOW)
        is_replaced = selected & (kind >= MASKED_BELOW) & (kind < REPLACED_BELOW)

        # The remainder is about uniform even among draws from a narrow interval.
        random_tokens = (draws % np.uint64(self.vocab_size)).astype(np.int64)

        masked = np.where(is_masked, self.mask_id, tokens)
        masked = np.where(is_replaced, random_tokens, masked)
        new_labels = np.where(selected, labels, np.int32(IGNORE_INDEX))
        return MaskedTokens(masked.astype(tokens.dtype), new_labels.astype(np.int32))
