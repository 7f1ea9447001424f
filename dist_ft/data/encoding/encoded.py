"""Encoded rows, one after the other: the result of every encoder.

n is the number of rows, `sum` the number of their tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class EncodedRows:
    """Tokenized rows, one after the other.

    Attributes:
        tokens: (sum,) int32 token ids.
        targets: (sum,) uint8: 1 where the token is a target; or int32: the label at this position,
            or `IGNORE_INDEX`.
        offsets: (n + 1,) int64: row i is tokens[offsets[i]:offsets[i + 1]].
        format: chat, instruction, text or tokens, or the name of the task; empty without any row.
        rows_per_range: rows of each shard range that was put together here.
        bad_rows: the problem of each row that was skipped; such rows have no tokens.
    """

    tokens: np.ndarray
    targets: np.ndarray
    offsets: np.ndarray
    format: str
    rows_per_range: tuple[int, ...] = ()
    bad_rows: tuple[str, ...] = ()
