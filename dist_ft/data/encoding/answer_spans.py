"""What a window of a context wants of a model that marks answers, in one number on one of its tokens.

It stands on the answer's first token and holds the place of its last, 0 on 0 where there is none; and besides, for
whoever looks for an answer, which tokens of the window are the context's: a question is no answer to itself. Pure.
"""

from __future__ import annotations

from typing import Any, NamedTuple

POSITION_BITS = 14
"""Bits of a place; of the tokenizer's own tokens at the end three are left."""
MAX_LENGTH = 2**POSITION_BITS
_MASK = MAX_LENGTH - 1
_MOST_TAIL = 7


class AnswerSpan(NamedTuple):
    """Place of an answer's last token, of the context's first, and how many tokens follow the context's last."""

    last: int
    begin: int
    tail: int


def pack(span: AnswerSpan) -> int:
    """Return a span as one number below 2**31."""
    return span.last | span.begin << POSITION_BITS | min(span.tail, _MOST_TAIL) << 2 * POSITION_BITS


def unpack(number: int) -> AnswerSpan:
    """Return what `pack` was given."""
    return AnswerSpan(number & _MASK, number >> POSITION_BITS & _MASK, number >> 2 * POSITION_BITS)


def last_tokens(labels: Any) -> Any:
    """Return the places of last tokens in an array or tensor of packed spans."""
    return labels & _MASK


def find_context(parts: list[int | None]) -> tuple[int, int]:
    """Return (first token, tokens after the last) of the context; `parts` says of each token 0, 1 or None (neither)."""
    own = [place for place, part in enumerate(parts) if part == 1]
    return (own[0], len(parts) - 1 - own[-1]) if own else (len(parts) - 1, 1)
