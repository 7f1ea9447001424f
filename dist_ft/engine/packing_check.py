"""Checks before step 1 that the model keeps packed samples apart.

For some models and attention kernels transformers builds the mask from position ids; for others it
silently ignores them. Then packed samples attend to each other, and training goes wrong without an
error.

Dimensions: B = 1 row per batch, T tokens.
"""

from __future__ import annotations

import numpy as np

from dist_ft.core.errors import ModelError
from dist_ft.data.batch import IGNORE_INDEX, Batch
from dist_ft.engine.base import Engine

LENGTHS = (11, 13, 9)
"""Tokens of each packed sample."""
MIDDLE = 1


def _pack(lengths: tuple[int, ...], tokens: np.ndarray, target_sample: int | None = None) -> Batch:
    """Return a batch of one sequence of packed samples.

    Args:
        lengths: lengths of the samples.
        tokens: (T,) of all samples.
        target_sample: the only sample with targets. Default: all have targets.
    """
    # Positions restart at 0 in each sample, which is how transformers finds its start.
    position_ids = np.concatenate([np.arange(length) for length in lengths])  # (T,)
    sample_ids = np.repeat(np.arange(len(lengths)), lengths)  # (T,)

    # The last token of a sample predicts nothing; its next token belongs to another sample.
    targets = np.roll(tokens, -1)  # (T,)
    targets[np.cumsum(lengths) - 1] = IGNORE_INDEX
    if target_sample is not None:
        targets[sample_ids != target_sample] = IGNORE_INDEX

    segments = np.array([[i, 0, length] for i, length in enumerate(lengths)], dtype=np.int64)
    return Batch(tokens[None], targets[None], position_ids[None], segments, lane=-1)


def require_packing(engine: Engine, vocabulary: int, tolerance: float) -> None:
    """Raise ModelError unless packed samples have the loss they have alone.

    A sum of losses hides small leaks, especially in bfloat16. So the loss of the middle sample is
    also computed next to other neighbors, which may only change its rounding. A collective call
    under ZeRO-3.

    Args:
        engine: its `loss_sum` is called six times.
        vocabulary: number of token ids that may be used.
        tolerance: largest relative difference for the number format; for other neighbors, a
            hundredth of it.
    """
    # The same tokens on every rank, so that all ranks come to the same decision.
    tokens = (np.arange(sum(LENGTHS), dtype=np.int64) * 7919 + 11) % vocabulary  # (T,)
    samples = np.split(tokens, np.cumsum(LENGTHS)[:-1])

    packed = engine.loss_sum(_pack(LENGTHS, tokens))
    alone = 0.0
    for length, sample in zip(LENGTHS, samples, strict=True):
        alone += engine.loss_sum(_pack((length,), sample))

    other_first = (samples[0] + vocabulary // 2) % vocabulary
    other_last = (samples[2] + vocabulary // 2) % vocabulary
    other_tokens = np.concatenate([other_first, samples[MIDDLE], other_last])  # (T,)
    middle = engine.loss_sum(_pack(LENGTHS, tokens, target_sample=MIDDLE))
    middle_by_others = engine.loss_sum(_pack(LENGTHS, other_tokens, target_sample=MIDDLE))

    # The second bound can be much tighter: both passes run the same kernels on the same shapes.
    packed_as_alone = abs(packed - alone) <= tolerance * abs(alone)
    unaffected = abs(middle - middle_by_others) <= tolerance / 100 * abs(middle_by_others)
    if not (packed_as_alone and unaffected):
        raise ModelError(
            "data.pack=true: with this model and model.attention, packed samples attend to each "
            f"other (loss {packed:.4f} packed, {alone:.4f} alone; {middle:.4f} and "
            f"{middle_by_others:.4f} next to other samples). Set data.pack=false, or use another "
            "model.attention."
        )
