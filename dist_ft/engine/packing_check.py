"""Does this model keep packed samples apart? Asked of the engine itself before step 1.

transformers builds the mask from position ids for some models and attention kernels and silently ignores them for
others; then packed samples see each other and training goes wrong without an error.
"""

from __future__ import annotations

import numpy as np

from dist_ft.core.errors import ModelError
from dist_ft.data.batch import IGNORE_INDEX, Batch
from dist_ft.engine.base import Engine

LENGTHS = (11, 13, 9)


def _row(lengths: tuple[int, ...], tokens: np.ndarray, learned: int | None = None) -> Batch:
    """Return one packed sequence of samples of `lengths`, with targets in all of them or in the one `learned`."""
    positions = np.concatenate([np.arange(length) for length in lengths])[None]
    targets, samples = np.roll(tokens, -1), np.repeat(np.arange(len(lengths)), lengths)
    targets[np.cumsum(lengths) - 1] = IGNORE_INDEX
    if learned is not None:
        targets[samples != learned] = IGNORE_INDEX
    segments = np.array([[i, 0, length] for i, length in enumerate(lengths)], dtype=np.int64)
    return Batch(tokens[None], targets[None], positions, segments, lane=-1)


def require_packing(engine: Engine, vocabulary: int, tolerance: float) -> None:
    """Raise ModelError unless packed samples have the loss they have alone; a collective call under ZeRO-3.

    Sums hide small leaks, above all in bfloat16; so the sample in the middle is asked a second time with other
    neighbours, which may change nothing but the rounding.

    Args:
        engine: whose `loss_sum` is asked, six times.
        vocabulary: number of token ids that may be used.
        tolerance: largest relative difference, by number format; for other neighbours a hundredth of it.
    """
    tokens = (np.arange(sum(LENGTHS), dtype=np.int64) * 7919 + 11) % vocabulary
    parts = np.split(tokens, np.cumsum(LENGTHS)[:-1])
    first, last = ((part + vocabulary // 2) % vocabulary for part in (parts[0], parts[2]))
    other = np.concatenate([first, parts[1], last])
    packed = engine.loss_sum(_row(LENGTHS, tokens))
    alone = sum(
        engine.loss_sum(_row((length,), part)) for length, part in zip(LENGTHS, parts, strict=True)
    )
    here, there = (engine.loss_sum(_row(LENGTHS, row, learned=1)) for row in (tokens, other))
    if not (
        abs(packed - alone) <= tolerance * abs(alone)
        and abs(here - there) <= tolerance / 100 * abs(there)
    ):
        raise ModelError(
            f"data.pack=true: with this model and model.attention packed samples see each other (loss {packed:.4f} "
            f"packed, {alone:.4f} alone; {here:.4f} and {there:.4f} beside other samples); set data.pack=false, or "
            "another model.attention"
        )
