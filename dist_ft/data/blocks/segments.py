"""Samples to pieces: what becomes of a sample that is longer than a sequence, and what a block holds in the end.

Pure. A piece is a run of tokens of one sample that fits into a sequence; most samples are one piece. Pieces with
nothing to learn are left out. Cuts by `data.overlong`: truncate keeps the start, drop keeps nothing, split goes on in
further pieces (which costs one target a cut: the first token of a piece has nothing before it to be told from).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from dist_ft.config.schema import DataSection
from dist_ft.data.blocks.token_cache import TokenisedBlock
from dist_ft.data.sampling.packing import pack


@dataclass(frozen=True)
class Measures:
    """The numbers of one block.

    Attributes:
        num_rows: rows that count, those left out too.
        part_rows: rows of each part, whether they count or not.
        num_pieces: pieces that are trained on.
        num_sequences: sequences they make; the same in every epoch.
        num_tokens: tokens of these pieces.
        num_targets: tokens learned.
        num_left_out: rows of which nothing is trained on.
        num_too_long: rows longer than a sequence.
        longest, longest_row: tokens of the longest row, and its number.
        num_bad, first_bad: rows that could not be used, and what was wrong with the first.
        format: chat, instruction, text or tokens, or the name of the task.
        checksum: of tokens and targets.
    """

    num_rows: int
    part_rows: tuple[int, ...]
    num_pieces: int
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


def pieces_of(
    block: TokenisedBlock, sequence_length: int, overlong: str, max_rows: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the pieces (P, 3) int64 [row, first token, number of tokens] of a block, and their targets (P,) int64.

    Under overlong=error rows are cut as for truncate (`judge` refuses them). Only the first `max_rows` rows count.
    """
    lengths = np.diff(block.offsets)[:max_rows]
    learned = np.concatenate([[0], np.cumsum(block.learned, dtype=np.int64)])
    rows, first, size = cut(lengths, sequence_length, overlong)
    start = block.offsets[:-1][rows] + first
    first_told = (
        start if block.is_labelled else np.minimum(start + 1, start + size)
    )  # what comes first, none foretells
    targets = learned[start + size] - learned[first_told]
    kept = targets > 0
    return np.stack([rows, first, size], axis=1)[kept], targets[kept]


def measure(
    block: TokenisedBlock, data: DataSection, sequence_length: int, max_rows: int | None = None
) -> Measures:
    """Return the numbers of a block."""
    pieces, targets = pieces_of(block, sequence_length, data.overlong, max_rows)
    lengths = np.diff(block.offsets)[:max_rows]
    sequences = (
        len(pieces)
        if not data.pack
        else int(pack(pieces[:, 2], sequence_length).max(initial=-1)) + 1
    )
    longest = int(np.argmax(lengths)) if len(lengths) else 0
    return Measures(
        num_rows=len(lengths),
        part_rows=block.part_rows,
        num_pieces=len(pieces),
        num_sequences=sequences,
        num_tokens=int(pieces[:, 2].sum()),
        num_targets=int(targets.sum()),
        num_left_out=len(lengths) - len(np.unique(pieces[:, 0])),
        num_too_long=int((lengths > sequence_length).sum()),
        longest=int(lengths[longest]) if len(lengths) else 0,
        longest_row=longest,
        num_bad=len(block.bad_rows),
        first_bad=block.bad_rows[0] if block.bad_rows else "",
        format=block.format,
        checksum=block.checksum,
    )


def nothing_of(found: Measures) -> Measures:
    """Return the numbers of a block of which no row counts: only what it is made of stays."""
    return replace(
        found,
        num_rows=0,
        num_pieces=0,
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


def cut(
    lengths: np.ndarray, sequence_length: int, overlong: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
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
