"""From tokens of sequences to a batch: masked or augmented, padded and shifted.

Guarantee: a target is predicted from tokens of its own sample only.

Dimensions: B sequences (rows) of T tokens; N segments with L tokens in all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from dist_ft.data.batch import IGNORE_INDEX, Batch, empty_batch
from dist_ft.data.batching.augmentation import Augmentation
from dist_ft.data.batching.masking import Masking
from dist_ft.data.blocks.token_cache import TokenizedBlock


class SequenceTokens(NamedTuple):
    """The segments of one sequence, with their tokens.

    Attributes:
        source: number of the source.
        tokens: int32 token ids of each segment.
        targets: uint8 marks or int32 labels of each segment; see `TokenizedBlock`.
        segments: int64 (n, 4) [sample id, first token, number of tokens, epoch].
    """

    source: int
    tokens: list[np.ndarray]
    targets: list[np.ndarray]
    segments: np.ndarray


def read_segments(
    block: TokenizedBlock, bounds: np.ndarray
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return tokens and targets of segments of a block.

    `bounds`: int64 (n, 3) [row, first token, number of tokens].
    """
    row, first, size = bounds.T
    starts = block.offsets[row] + first
    tokens = []
    targets = []
    for start, stop in zip(starts.tolist(), (starts + size).tolist(), strict=True):
        tokens.append(block.tokens[start:stop])
        targets.append(block.targets[start:stop])
    return tokens, targets


@dataclass(frozen=True)
class BatchBuilder:
    """Builds batches.

    Attributes:
        masking: masking of a masked language model; None: no masking.
        augmentation: augmentation of training texts; None: no augmentation.
    """

    masking: Masking | None = None
    augmentation: Augmentation | None = None

    def build(self, sequences: Sequence[SequenceTokens], lane: int) -> Batch:
        """Return the batch of a lane: its sequences, one a row."""
        if not sequences:
            return empty_batch(lane=lane)

        tokens = np.concatenate([part for own in sequences for part in own.tokens])  # (L,)
        targets = np.concatenate([part for own in sequences for part in own.targets])  # (L,)
        # The segments are as stored in the data: masks, augmentation and the ledger identify a
        # sample by them.
        segments = np.concatenate([own.segments for own in sequences])  # (N, 4)
        segments_per_row = [len(own.segments) for own in sequences]
        rows = np.repeat(np.arange(len(sequences)), segments_per_row)  # (N,)

        if self.masking is not None:
            tokens, targets = self.masking.apply(tokens, targets, segments)
        lengths = None
        if self.augmentation is not None:
            tokens, targets, lengths = self.augmentation.apply(tokens, targets, segments)

        batch = assemble_batch(tokens, targets, segments, rows, lane, lengths)
        row_sources = [(own.source, own.segments[:, 2].sum()) for own in sequences]
        return replace(batch, row_sources=np.array(row_sources))


def assemble_batch(
    tokens: np.ndarray,
    targets: np.ndarray,
    segments: np.ndarray,
    rows: np.ndarray,
    lane: int,
    changed_lengths: np.ndarray | None = None,
) -> Batch:
    """Return the batch of consecutive segments, row by row.

    Args:
        tokens: (L,) token ids of all segments.
        targets: (L,) uint8: 1 where a token is a next-token target; or int32: labels, which keep
            their positions.
        segments: (N, 4) [sample id, first token, number of tokens, epoch].
        rows: (N,) the row of each segment, ascending from 0.
        lane: stored in the batch.
        changed_lengths: (N,) tokens of each segment, if they differ from `segments`.
    """
    lengths = changed_lengths
    if lengths is None:
        lengths = segments[:, 2]
    ends = np.cumsum(lengths)  # (N,)

    # labels belong to their own position; marks of next-token targets are shifted by one
    flat_targets = targets  # (L,)
    if targets.dtype != np.int32:
        flat_targets = _next_token_targets(tokens, targets, ends)
    flat_positions = np.arange(len(tokens)) - np.repeat(ends - lengths, lengths)

    # a row ends with its last segment
    last_segments = np.append(np.flatnonzero(np.diff(rows)), len(rows) - 1)  # (B,)
    row_edges = [0, *ends[last_segments].tolist()]
    num_rows = len(row_edges) - 1
    num_tokens = max(stop - start for start, stop in pairwise(row_edges))

    input_ids = np.zeros((num_rows, num_tokens), dtype=np.int64)
    target_ids = np.full((num_rows, num_tokens), IGNORE_INDEX, dtype=np.int64)
    position_ids = np.empty((num_rows, num_tokens), dtype=np.int64)
    for row, (start, stop) in enumerate(pairwise(row_edges)):
        length = stop - start
        input_ids[row, :length] = tokens[start:stop]
        target_ids[row, :length] = flat_targets[start:stop]
        position_ids[row, :length] = flat_positions[start:stop]
        # positions restart at 0 where a sample starts, so the padding is a sample of its own
        position_ids[row, length:] = np.arange(num_tokens - length)

    return Batch(
        input_ids, target_ids, position_ids, segments, lane, changed_lengths=changed_lengths
    )


def _next_token_targets(tokens: np.ndarray, is_target: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Return the next token of the same segment where it is a target, else `IGNORE_INDEX`.

    Args:
        tokens: (L,) token ids.
        is_target: (L,) 1 where a token is a target.
        ends: (N,) the position after each segment.

    Returns:
        (L,), of the type of `tokens`.
    """
    next_is_target = np.zeros(len(tokens), dtype=bool)
    next_is_target[:-1] = is_target[1:]
    next_is_target[ends - 1] = False  # the next token belongs to another segment

    targets = np.full(len(tokens), IGNORE_INDEX, dtype=tokens.dtype)
    np.copyto(targets[:-1], tokens[1:], where=next_is_target[:-1])
    return targets
