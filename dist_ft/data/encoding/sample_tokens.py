"""Texts of samples to tokens and targets, in one call of the tokenizer.

n is the number of samples, `sum` the number of their tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from dist_ft.data.sources.row_formats import RenderedSample
from dist_ft.pretrained import tokenizing


class TokenizedSamples(NamedTuple):
    """Samples as tokens, one after the other.

    Attributes:
        tokens: (sum,) int32 token ids.
        targets: (sum,) uint8: 1 where the token is a target.
        lengths: (n,) int64: tokens of each sample.
    """

    tokens: np.ndarray
    targets: np.ndarray
    lengths: np.ndarray


def tokenize_samples(
    backend: Any, samples: Sequence[RenderedSample], before: Sequence[int], after: Sequence[int]
) -> TokenizedSamples:
    """Tokenize samples in one call and put ids around each.

    The ids `before` are targets only if all tokens are. The ids `after` end an answer and are
    targets. An empty text gives no token at all.

    Args:
        backend: the backend of `exact_backend`.
        samples: n texts with their target spans.
        before: ids before each sample.
        after: ids after each sample.

    Raises:
        UntokenizableError: the tokenizer cannot take one of the texts.
    """
    texts = [sample.text for sample in samples]
    has_spans = any(sample.spans != [(0, len(sample.text))] for sample in samples)
    encode = backend.encode_batch_fast
    if has_spans:
        encode = backend.encode_batch  # only this one reports the character ranges of tokens
    with tokenizing.tokenizing_errors():
        encodings = encode(texts, add_special_tokens=False)

    # filled from iterators: lists of all tokens as Python objects would be many times larger
    lengths = np.fromiter(map(len, encodings), np.int64, len(texts))
    total = int(lengths.sum())
    ids = np.fromiter(chain.from_iterable(encoding.ids for encoding in encodings), np.int32, total)
    is_target = np.ones(total, dtype=np.uint8)
    if has_spans:
        numbers = chain.from_iterable(
            chain.from_iterable(encoding.offsets for encoding in encodings)
        )
        ranges = np.fromiter(numbers, np.int64, 2 * total).reshape(-1, 2)  # (sum, 2)
        is_target = mark_span_tokens(ranges, lengths, samples)

    # Position of every text token among the framed samples: (sum,)
    framed_lengths = np.where(lengths > 0, lengths + len(before) + len(after), 0)  # (n,)
    starts = np.cumsum(framed_lengths) - framed_lengths
    text_starts = np.cumsum(lengths) - lengths
    positions = np.repeat(starts + len(before) - text_starts, lengths) + np.arange(total)

    tokens = np.empty(int(framed_lengths.sum()), dtype=np.int32)
    targets = np.full(len(tokens), int(not has_spans), dtype=np.uint8)
    tokens[positions] = ids
    targets[positions] = is_target

    not_empty = lengths > 0
    for i, token in enumerate(before):
        tokens[starts[not_empty] + i] = token
    for i, token in enumerate(after):
        position = (starts + framed_lengths - len(after) + i)[not_empty]
        tokens[position] = token
        targets[position] = 1

    return TokenizedSamples(tokens, targets, framed_lengths)


def mark_span_tokens(
    ranges: np.ndarray, lengths: np.ndarray, samples: Sequence[RenderedSample]
) -> np.ndarray:
    """Return uint8 (sum,): 1 where a token shares a character with a target span of its sample.

    Args:
        ranges: (sum, 2) character ranges of the tokens, each counted from the start of its own
            sample.
        lengths: (n,) tokens of each sample.
        samples: n samples with their target spans.
    """
    # All texts side by side, with one character between them: mark where spans start and stop.
    sizes = np.array([len(sample.text) + 1 for sample in samples], dtype=np.int64)
    bases = np.cumsum(sizes) - sizes
    changes = np.zeros(int(sizes.sum()) + 1, dtype=np.int32)
    for base, sample in zip(bases.tolist(), samples, strict=True):
        for start, stop in sample.spans:
            changes[base + start] += 1
            changes[base + stop] -= 1

    # num_inside[i]: target characters before character i. A token is a target if it adds any.
    num_inside = np.concatenate([[0], np.cumsum(np.cumsum(changes) > 0)])
    starts, stops = (ranges + np.repeat(bases, lengths)[:, None]).T
    return (num_inside[stops] > num_inside[starts]).astype(np.uint8)
