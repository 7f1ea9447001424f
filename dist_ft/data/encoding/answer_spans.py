"""The label of one window in question answering: an answer span packed into one number.

The number is the label of the answer's first token. It holds the position of the answer's last
token, 0 on token 0 if the window holds no answer. It also holds which tokens of the window belong
to the context, for code that searches for an answer: the question must not answer itself. Pure
functions.

Bits of the number, from the lowest: 14 for the answer's last token, 14 for the context's first, 3
for the number of tokens after the context. These are 31 bits: the number fits into an int32 label
and is never negative, which `IGNORE_INDEX` is. Windows are lists here, without a batch dimension.
"""

from __future__ import annotations

from typing import Any, NamedTuple

POSITION_BITS = 14
"""Bits of a position; 3 bits are left for the number of tokens after the context."""
MAX_LENGTH = 2**POSITION_BITS
"""Tokens of a window whose positions still fit."""
_POSITION_MASK = MAX_LENGTH - 1
_MAX_TAIL = 7


class ContextRange(NamedTuple):
    """The tokens of a window that belong to the context.

    Attributes:
        start: position of the context's first token.
        tail: number of tokens after the context's last.
    """

    start: int
    tail: int


class AnswerSpan(NamedTuple):
    """An answer in a window; its first token is where the label is.

    Attributes:
        last: position of the answer's last token.
        context_start: position of the context's first token.
        tail: number of tokens after the context's last.
    """

    last: int
    context_start: int
    tail: int


def pack(span: AnswerSpan) -> int:
    """Return a span as one number below 2**31."""
    # Usually one or two special tokens follow the context. A longer tail is cut, which only makes
    # the context look longer.
    tail = min(span.tail, _MAX_TAIL)
    return span.last | span.context_start << POSITION_BITS | tail << 2 * POSITION_BITS


def unpack(label: int) -> AnswerSpan:
    """Return the span that `pack` packed."""
    last = label & _POSITION_MASK
    context_start = label >> POSITION_BITS & _POSITION_MASK
    return AnswerSpan(last, context_start, label >> 2 * POSITION_BITS)


def last_tokens(labels: Any) -> Any:
    """Return the positions of last tokens in an array or tensor of packed spans."""
    # the same operator works for numpy and torch, so this module imports neither
    return labels & _POSITION_MASK


def find_context(sequence_ids: list[int | None]) -> ContextRange:
    """Return where the context is in a window.

    Args:
        sequence_ids: for each token, 0 in the question, 1 in the context, None if it is special.
    """
    positions = [position for position, sequence in enumerate(sequence_ids) if sequence == 1]

    # no context token: an empty range, which starts and ends at the last token
    if not positions:
        return ContextRange(len(sequence_ids) - 1, 1)
    return ContextRange(positions[0], len(sequence_ids) - 1 - positions[-1])
