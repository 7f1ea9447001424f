"""Samples as tokens, one after the other: what every encoder returns."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class EncodedRows:
    """Tokenised samples, one after the other.

    Attributes:
        tokens: (sum,) int32 token ids.
        targets: (sum,) uint8: 1 where the token is learned; or int32: what the task wants there, or `IGNORED`.
        offsets: (n + 1,) int64: sample i is tokens[offsets[i]:offsets[i + 1]].
        format: chat, instruction, text or tokens, or the name of the task; empty without any row.
        part_rows: rows of each part this was made of.
        bad_rows: what was wrong with each row that was skipped; such rows have no tokens.
    """

    tokens: np.ndarray
    targets: np.ndarray
    offsets: np.ndarray
    format: str
    rows_per_range: tuple[int, ...] = ()
    bad_rows: tuple[str, ...] = ()
