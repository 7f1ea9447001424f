"""Samples to segments, and the statistics of a block.

A segment is a run of tokens of one sample that fits into a sequence; most samples are one segment.
Segments without a target token are left out. `data.overlong` decides what happens to samples that
are longer than a sequence: truncate keeps the start, drop removes the sample, and split continues
in further segments (each of which loses one target: nothing precedes its first token). Pure.

P is the number of segments of a block, n the number of its rows, L the sum of their tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from dist_ft.config.schema import DataSection
from dist_ft.data.blocks.token_cache import TokenizedBlock
from dist_ft.data.sampling.packing import pack_best_fit


@dataclass(frozen=True)
class BlockStats:
    """The numbers of one block.

    Attributes:
        num_rows: rows that count (see `max_samples`), including those that are left out.
        rows_per_range: rows of each shard range, whether they count or not.
        num_segments: segments that are trained on.
        num_sequences: sequences of these segments; the same in every epoch.
        num_tokens: tokens of these segments.
        num_targets: target tokens.
        num_left_out: rows without a segment that is trained on.
        num_too_long: rows longer than a sequence.
        longest: tokens of the longest row.
        longest_row: its number.
        num_bad: rows that could not be used.
        first_bad: what was wrong with the first of them.
        format: chat, instruction, text or tokens, or the name of the task.
        checksum: checksum of tokens and targets.
    """

    num_rows: int
    rows_per_range: tuple[int, ...]
    num_segments: int
    num_sequences: int
    num_tokens: int
    num_targets: int
    num_left_out: int
    num_too_long: int
    longest: int
    longest_row: int
    num_bad: int
    first_bad: str
    format: str
    checksum: str


class Segments(NamedTuple):
    """The segments of a block that are trained on.

    Attributes:
        bounds: int64 (P, 3) [row, first token, number of tokens].
        num_targets: int64 (P,) target tokens of each.
    """

    bounds: np.ndarray
    num_targets: np.ndarray


def split_into_segments(
    block: TokenizedBlock, sequence_length: int, overlong: str, max_rows: int | None = None
) -> Segments:
    """Return the segments of a block.

    With overlong=error, rows are cut as with truncate (`check_index` refuses them later).

    Args:
        block: the tokenized rows.
        sequence_length: maximum tokens of a segment.
        overlong: `data.overlong`.
        max_rows: only this number of first rows counts; None: all.
    """
    row_lengths = np.diff(block.offsets)[:max_rows]  # (n,)
    bounds = segment_bounds(row_lengths, sequence_length, overlong)
    row, first, size = bounds.T
    start = block.offsets[:-1][row] + first
    stop = start + size

    # A next-token target cannot be a segment's first token, which nothing precedes. A label belongs
    # to its own token.
    first_target = start
    if not block.is_labeled:
        first_target = np.minimum(start + 1, stop)

    # prefix sums (L + 1,): one pass over the tokens, however many segments there are
    targets_before = np.concatenate([[0], np.cumsum(block.is_target, dtype=np.int64)])
    num_targets = targets_before[stop] - targets_before[first_target]
    # a segment without a target adds nothing to the loss
    has_target = num_targets > 0
    return Segments(bounds[has_target], num_targets[has_target])


def segment_bounds(row_lengths: np.ndarray, sequence_length: int, overlong: str) -> np.ndarray:
    """Return the segments of rows, int64 (P, 3) [row, first token, number of tokens].

    Args:
        row_lengths: (n,) tokens of each row.
        sequence_length: maximum tokens of a segment.
        overlong: `data.overlong`.
    """
    row_lengths = row_lengths.astype(np.int64)

    # rows that were skipped as bad keep their place, without tokens
    segments_per_row = (row_lengths > 0).astype(np.int64)  # (n,)
    if overlong == "drop":
        segments_per_row *= row_lengths <= sequence_length
    elif overlong == "split":
        segments_per_row = -(-row_lengths // sequence_length)

    rows = np.repeat(np.arange(len(row_lengths)), segments_per_row)
    first_of_row = np.cumsum(segments_per_row) - segments_per_row
    number_in_row = np.arange(len(rows)) - np.repeat(first_of_row, segments_per_row)

    first_token = number_in_row * sequence_length
    num_tokens = np.minimum(row_lengths[rows] - first_token, sequence_length)
    return np.stack([rows, first_token, num_tokens], axis=1)


def measure_block(
    block: TokenizedBlock, data: DataSection, sequence_length: int, max_rows: int | None = None
) -> BlockStats:
    """Return the statistics of a block; only its first `max_rows` rows count (None: all)."""
    segments, targets = split_into_segments(block, sequence_length, data.overlong, max_rows)
    row_lengths = np.diff(block.offsets)[:max_rows]

    # The same number as in any epoch: best-fit decreasing sees lengths only, not the order of the
    # segments.
    if data.pack:
        sequence_numbers = pack_best_fit(segments[:, 2], sequence_length)
        num_sequences = int(sequence_numbers.max(initial=-1)) + 1
    else:
        num_sequences = len(segments)

    longest = 0
    longest_row = 0
    if len(row_lengths):
        longest_row = int(np.argmax(row_lengths))
        longest = int(row_lengths[longest_row])

    first_bad = ""
    if block.bad_rows:
        first_bad = block.bad_rows[0]

    return BlockStats(
        num_rows=len(row_lengths),
        rows_per_range=block.rows_per_range,
        num_segments=len(segments),
        num_sequences=num_sequences,
        num_tokens=int(segments[:, 2].sum()),
        num_targets=int(targets.sum()),
        # rows, not segments: a row counts as left out only if it has no segment with a target
        num_left_out=len(row_lengths) - len(np.unique(segments[:, 0])),
        num_too_long=int((row_lengths > sequence_length).sum()),
        longest=longest,
        longest_row=longest_row,
        num_bad=len(block.bad_rows),
        first_bad=first_bad,
        format=block.format,
        checksum=block.checksum,
    )


def without_rows(stats: BlockStats) -> BlockStats:
    """Return the statistics of a block of which no row counts."""
    # `rows_per_range`, format and checksum stay: they describe the block, not what counts of it.
    return replace(
        stats,
        num_rows=0,
        num_segments=0,
        num_sequences=0,
        num_tokens=0,
        num_targets=0,
        num_left_out=0,
        num_too_long=0,
        longest=0,
        longest_row=0,
        num_bad=0,
        first_bad="",
    )
