"""Text without its escapes, and where each part of it is in the original.

A value that is printed by repr, as JSON, in a URL, as HTML or on several lines is spelled in
another way. Searching the text without escapes finds it in every such spelling, mixed ones too.
Pure.
"""

from __future__ import annotations

import html
import re
from bisect import bisect_right
from collections.abc import Callable
from itertools import accumulate
from typing import NamedTuple
from urllib.parse import unquote

_ESCAPE = re.compile(
    r"(?:%[0-9A-Fa-f]{2})+"  # URLs
    r"|(?:\\x[0-9A-Fa-f]{2})+|(?:\\[0-7]{3})+"  # repr, YAML, C
    r"|(?:\\u[0-9A-Fa-f]{4})+|\\U[0-9A-Fa-f]{8}"  # JSON too
    r"|\\[^\r\nA-Za-z0-9]|\\[abefnrtv]"
    r"|&\#[0-9]{1,7};|&\#[xX][0-9A-Fa-f]{1,6};|&[A-Za-z]{2,8};"  # HTML, XML
)
_CONTROL = {
    "a": "\a",
    "b": "\b",
    "e": "\x1b",
    "f": "\f",
    "n": "\n",
    "r": "\r",
    "t": "\t",
    "v": "\v",
}

# A line break that a terminal, a table or a file format put into a word, with what surrounds it:
# borders of a table, a quote mark, the `=` or backslash at the end of a line.
_BREAK = re.compile(r"[ \t]*[│┃|]?[ \t]*[=\\]?\r?\n[ \t]*[│┃|>#]?[ \t]*")

MAX_LAYERS = 3
"""Escapes within escapes that are resolved: JSON in a repr in a URL."""


class _Piece(NamedTuple):
    """A part of a text that replaces [start, end) of the text before; `is_same`: unchanged."""

    text: str
    start: int
    end: int
    is_same: bool


class Resolved:
    """A text without escapes.

    Attributes:
        text: the text.
    """

    def __init__(self, pieces: list[_Piece], below: Resolved | None) -> None:
        self.text = "".join(piece.text for piece in pieces)
        self._pieces = pieces
        self._below = below
        lengths = accumulate((len(piece.text) for piece in pieces), initial=0)
        self._starts = list(lengths)[:-1]

    def original(self, start: int, end: int) -> tuple[int, int]:
        """Return where [start, end) of the text is in the original; whole escapes."""
        first = self._position(start, at_end=False)
        last = self._position(end - 1, at_end=True)
        if self._below is None:
            return first, last
        return self._below.original(first, last)

    def _position(self, offset: int, at_end: bool) -> int:
        number = bisect_right(self._starts, offset) - 1
        piece = self._pieces[number]
        if piece.is_same:
            return piece.start + offset - self._starts[number] + int(at_end)
        return piece.end if at_end else piece.start


def resolve_escapes(text: str) -> list[Resolved]:
    """Return `text` with one, two and three layers of escapes resolved, as far as it has them."""
    layers: list[Resolved] = []
    while len(layers) < MAX_LAYERS:
        below = layers[-1] if layers else None
        layer = _replace(below.text if below else text, _ESCAPE, _resolve, below)
        if layer is None:
            break
        layers.append(layer)
    return layers


def join_lines(text: str, below: Resolved | None) -> list[Resolved]:
    """Return `text` (that of `below`, if given) with its lines joined: directly, and by a space.

    Nothing if it is one line.
    """
    if "\n" not in text:
        return []
    joined = _replace(text, _BREAK, lambda _: "", below)
    spaced = _replace(text, _BREAK, lambda _: " ", below)
    return [layer for layer in (joined, spaced) if layer is not None]


def _replace(
    text: str, pattern: re.Pattern[str], new_text: Callable[[str], str], below: Resolved | None
) -> Resolved | None:
    """Return `text` with every match of `pattern` replaced; None if there is no match."""
    pieces: list[_Piece] = []
    position = 0
    for match in pattern.finditer(text):
        start, end = match.span()
        if start > position:
            pieces.append(_Piece(text[position:start], position, start, is_same=True))

        new = new_text(match[0])
        if new:
            pieces.append(_Piece(new, start, end, is_same=False))
        position = end

    if not position:
        return None
    if position < len(text):
        pieces.append(_Piece(text[position:], position, len(text), is_same=True))
    return Resolved(pieces, below)


def _resolve(escape: str) -> str:
    """Return what an escape stands for."""
    if escape[0] == "%":
        return unquote(escape, errors="replace")
    if escape[0] == "&":
        return html.unescape(escape)

    kind = escape[1]
    if kind == "x":
        return _decode(bytes.fromhex(escape.replace("\\x", "")))
    if kind in "01234567":
        return _decode(bytes(int(number, 8) % 256 for number in escape.split("\\")[1:]))
    if kind == "u":
        # Characters beyond the first 65,536 are pairs of such escapes.
        pairs = bytes.fromhex(escape.replace("\\u", ""))
        return pairs.decode("utf-16-be", "surrogatepass" if len(pairs) == 2 else "replace")
    if kind == "U":
        number = int(escape[2:], 16)
        return chr(number) if number <= 0x10FFFF else escape
    return _CONTROL.get(kind, kind)


def _decode(content: bytes) -> str:
    """Return the text of escaped bytes: those of UTF-8 in a repr of bytes, else code points."""
    try:
        return content.decode()
    except UnicodeDecodeError:
        return content.decode("latin-1")
