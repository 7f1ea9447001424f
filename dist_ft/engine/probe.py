"""Does this model keep packed samples apart? Asked of the engine itself before step 1.

transformers builds the mask from position ids for some models and attention kernels and silently ignores them for
others; then packed samples see each other and training goes wrong without an error.
"""

from __future__ import annotations

import numpy as np

from dist_ft.data.batch import Batch
from dist_ft.engine.base import Engine
from dist_ft.errors import ModelError

LENGTHS = (11, 13, 9)


def _row(lengths: tuple[int, ...], tokens: np.ndarray) -> Batch:
    """Return one packed sequence of samples of `lengths`."""
    positions = np.concatenate([np.arange(length) for length in lengths])[None]
    targets = np.roll(tokens, -1)
    targets[np.cumsum(lengths) - 1] = -100
    pieces = np.array([[i, 0, length] for i, length in enumerate(lengths)], dtype=np.int64)
    return Batch(tokens[None], targets[None], positions, pieces, lane=-1)


def require_packing(engine: Engine, vocabulary: int, tolerance: float) -> None:
    """Raise ModelError unless packed samples have the loss they have alone; a collective call under ZeRO-3.

    Args:
        engine: whose `loss_sum` is asked, four times.
        vocabulary: number of token ids that may be used.
        tolerance: largest relative difference, by number format.
    """
    tokens = (np.arange(sum(LENGTHS), dtype=np.int64) * 7919 + 11) % vocabulary
    packed = engine.loss_sum(_row(LENGTHS, tokens))
    parts = np.split(tokens, np.cumsum(LENGTHS)[:-1])
    alone = sum(engine.loss_sum(_row((length,), part)) for length, part in zip(LENGTHS, parts, strict=True))
    if not abs(packed - alone) <= tolerance * abs(alone):
        raise ModelError(
            f"data.pack=true: with this model and model.attention packed samples see each other (loss {packed:.4f} "
            f"packed, {alone:.4f} alone); set data.pack=false, or another model.attention")
