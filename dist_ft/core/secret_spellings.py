"""The spellings of a secret: quoted, escaped and encoded, as texts that hold it may have it. Pure.

Percent-encoding, escapes of repr and JSON, and HTML are resolved before the search
(`core.escapes`), so only what that does not find is here.
"""

from __future__ import annotations

import html
import json
import quopri
import shlex
from base64 import b32encode, b64encode
from collections.abc import Iterator
from typing import NamedTuple
from urllib.parse import quote, quote_plus

MIN_SECRET_LENGTH = 4
"""Shorter values of variables are not searched for. They are in every log by chance ("1", "no"),
so hiding them would make logs unreadable, and would protect nothing: all of them can be tried. A
value of any length is hidden where its name stands before it (`password=abc`)."""
MIN_ANYWHERE = 6
"""Shorter values, and plain words and numbers of less than 8 characters, are hidden only where
they are whole words: `test` as a password must not change `latest`."""
MIN_PLAIN = 8

_BASE64_OFFSETS = (0, 1, 2)


class Needle(NamedTuple):
    """A spelling of a secret.

    Attributes:
        text: what is searched for.
        name: the variable.
        is_whole: count it only where no letter or digit is next to it.
        is_base64: the characters next to it hold bits of the secret.
    """

    text: str
    name: str
    is_whole: bool = False
    is_base64: bool = False


def spellings(value: str, name: str) -> Iterator[Needle]:
    """Yield the spellings of a secret that searching the text without escapes does not find."""
    is_plain = value.isalpha() or value.isdigit()
    is_whole = len(value) < MIN_ANYWHERE or (is_plain and len(value) < MIN_PLAIN)
    yield Needle(value, name, is_whole)

    # A variable may hold bytes that are no text.
    content = value.encode("utf-8", "surrogateescape")

    # A value with special characters: as it is quoted by shells, YAML, CSV and templates.
    texts = {
        quote(content, safe=""),
        quote_plus(content),
        value.replace(" ", "+"),
        json.dumps(value)[1:-1],
        json.dumps(json.dumps(value))[3:-3],
        repr(value)[1:-1],
        repr(content)[2:-1],
        html.escape(value),
        shlex.quote(value).strip("'"),
        value.replace("'", "''"),
        value.replace("'", "'\\''"),
        value.replace('"', '""'),
        value.replace("{", "{{").replace("}", "}}"),
        value.replace("%", "%%"),
        value.replace("$", "$$"),
        "".join(value.split()),
    }
    texts.add(quopri.encodestring(content).decode("ascii"))
    for text in texts - {value}:
        if len(text) >= MIN_SECRET_LENGTH:
            yield Needle(text, name, is_whole)

    # Encodings of bytes.
    for separator in ("", ":", " ", "-"):
        digits = content.hex(separator) if separator else content.hex()
        yield Needle(digits, name, is_whole=len(content) < MIN_ANYWHERE)
        yield Needle(digits.upper(), name, is_whole=len(content) < MIN_ANYWHERE)
    base32 = b32encode(content).decode("ascii").rstrip("=")
    yield Needle(base32, name, is_whole=len(content) < MIN_ANYWHERE)
    yield from _base64(content, name)


def _base64(content: bytes, name: str) -> Iterator[Needle]:
    """Yield what is in every base64 text that has `content` somewhere, as in Basic user:password.

    Three bytes become four characters, so there is a spelling for each position in such a group.
    """
    whole = b64encode(content).decode("ascii").rstrip("=")
    yield Needle(whole, name, is_whole=True, is_base64=True)

    # A short one shares too few characters; `redaction` decodes what may be base64 instead.
    for offset in _BASE64_OFFSETS:
        encoded = b64encode(b"\0" * offset + content).decode("ascii")
        # The first and last characters also hold bits of what is before and after it.
        first = -(-offset * 8 // 6)
        last = (offset + len(content)) * 8 // 6
        inner = encoded[first:last]
        if len(inner) < MIN_ANYWHERE:
            continue

        url_safe = inner.replace("+", "-").replace("/", "_")
        for text in {inner, url_safe}:
            yield Needle(text, name, is_base64=True)
