"""Removes credentials from text.

Guarantees: no value of a secret environment variable (`core.secret_names`) is in what `redact`
returns, whole and in the spellings of repr, JSON, YAML, shells, URLs, HTML, base64 and hexadecimal,
or broken over lines; nor is what is a credential by its form (`core.secret_forms`). A text without
one is returned as it is.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from base64 import b64decode
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from dist_ft.core.escapes import Resolved, join_lines, resolve_escapes
from dist_ft.core.secret_forms import (
    CHOICES,
    NOTHING,
    USERINFO,
    content_spans,
    is_key_file,
    secret_spans,
    url_spans,
)
from dist_ft.core.secret_names import is_secret_name, is_secret_variable, is_strong_secret_name
from dist_ft.core.secret_spellings import (
    MIN_ANYWHERE,
    MIN_PLAIN,
    MIN_SECRET_LENGTH,
    Needle,
    spellings,
)

REDACTED = "<redacted>"

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_BASE64_TOKEN = re.compile(r"[A-Za-z0-9+/_-]{8,}={0,2}")
_BASE64_CHARACTER = re.compile(r"[A-Za-z0-9+=_-]")


class _Hidden(NamedTuple):
    """A part [start, end) of a text to hide, and what is shown in its place."""

    start: int
    end: int
    label: str


_remembered: dict[str, str] = {}


def remember_secret(name: str, value: str) -> None:
    """Hide `value`, which was read from a file `name` or the like, as if it were in a variable."""
    if len(value) >= MIN_SECRET_LENGTH:
        _remembered[value] = name


def redact(text: str, is_content: bool = False) -> str:
    """Return `text` without credentials: `<NAME>` in place of the value of a variable.

    Args:
        text: any text.
        is_content: it may hold data or text that a model generated. `password=...` is left as it
            is in such a text; values of variables, known keys and URLs are not.
    """
    find_spans = content_spans if is_content else secret_spans

    # Read at each call, since variables may be set after logging was set up.
    needles = _needles(tuple(os.environ.items()), tuple(_remembered.items()))

    hidden = [*_find(needles, text, None), *_find_short_in_base64(needles, text)]
    hidden += [_Hidden(start, end, REDACTED) for start, end in find_spans(text)]

    layers: list[Resolved] = []
    if "\\" in text or "%" in text or "&" in text:
        layers = resolve_escapes(text)
    for layer in layers:
        hidden += _find(needles, layer.text, layer)
        for span in find_spans(layer.text):
            hidden.append(_Hidden(*layer.original(*span), REDACTED))

    # A word that was broken over lines.
    for below in (None, *layers):
        for layer in join_lines(below.text if below else text, below):
            hidden += _find(needles, layer.text, layer)

    if not hidden:
        return text
    return _hide(text, hidden)


def redact_values(value: Any, is_content: bool = False) -> Any:
    """Return plain nested data with all its texts redacted; keys too, unless they are field names.

    Use it for data that is parsed again: a redacted JSON or YAML text may not be valid any more.
    """
    if isinstance(value, str):
        return redact(value, is_content)
    if isinstance(value, Mapping):
        result = {}
        for key, item in value.items():
            if isinstance(key, str) and not re.fullmatch(r"[a-z_]*", key):
                key = redact(key, is_content)
            result[key] = redact_values(item, is_content)
        return result
    if isinstance(value, list | tuple):
        return [redact_values(item, is_content) for item in value]
    return value


def holds_secret(text: str) -> bool:
    """Whether a part of `text` is a credential by form, or the value of a secret variable."""
    return bool(secret_spans(text)) or holds_variable(text)


def holds_variable(text: str) -> bool:
    """Whether `text` has the value of a secret variable in it, of at least 8 characters."""
    for value in secrets_of_environment():
        # A word or a number may be in a path by chance, however long it is.
        if value in text and not (value.isalpha() or value.isdigit()):
            return True
    return False


def secrets_of_environment() -> Mapping[str, str]:
    """Return {value: variable} of the credentials in this process's environment.

    Only values of at least 8 characters, and no paths: those that may be searched for in files.
    """
    return _long_secrets(tuple(os.environ.items()))


@lru_cache(maxsize=2)
def _long_secrets(environment: tuple[tuple[str, str], ...]) -> Mapping[str, str]:
    found = {}
    for name, value in environment:
        for part in _secrets_in(name, value):
            if len(part) >= MIN_PLAIN:
                found[part] = name
    return found


# --- what is secret in the environment


def _secrets_in(name: str, value: str) -> Iterator[str]:
    """Yield the secret values in a variable, which may be a URL, JSON or several lines."""
    value = value.strip()
    if is_secret_variable(name) and not _is_public(name, value):
        yield value

        # Parts of it may be printed alone: a line of a private key, a field of a JSON file.
        lines = value.splitlines()
        if len(lines) > 1:
            yield from _long_lines(lines)
        yield from _secret_fields(value)

    # HTTPS_PROXY, DATABASE_URL: a URL with a password, under any name. A text with URLs is none:
    # shells and test runners keep commands and names of tests in variables.
    if _URL.match(value) and len(value.split()) == 1:
        for match in USERINFO.finditer(value):
            yield match[0].rpartition(":")[2]
        for span in url_spans(value):
            yield value[span.start : span.end]


def _secret_fields(value: str) -> Iterator[str]:
    """Yield the secret fields of a JSON document or of a connection string (Name=value;...)."""
    if value.startswith("{"):
        with contextlib.suppress(ValueError, RecursionError):
            yield from _secret_leaves(json.loads(value), "")
    elif "=" in value and ";" in value:
        for part in value.split(";"):
            name, _, content = part.partition("=")
            if is_secret_name(name.strip()):
                yield content.strip()


def _secret_leaves(value: Any, name: str) -> Iterator[str]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _secret_leaves(item, str(key))
    elif isinstance(value, list):
        for item in value:
            yield from _secret_leaves(item, name)
    elif isinstance(value, str) and is_secret_name(name):
        yield value
        yield from _long_lines(value.splitlines())


def _long_lines(lines: Sequence[str]) -> Iterator[str]:
    """Yield lines of a secret that are secret themselves: not the marks around a private key."""
    for line in lines:
        if len(line.strip()) >= MIN_PLAIN and "-----" not in line:
            yield line.strip()


def _is_public(name: str, value: str) -> bool:
    """Whether a variable with the name of a credential holds a choice, a path or a number."""
    is_strong = is_strong_secret_name(name)
    if value.lower() in (NOTHING if is_strong else CHOICES) or is_key_file(value):
        return True
    if value.startswith(("/", "~/", "./")) and os.path.exists(os.path.expanduser(value)):
        return True

    # SORT_KEY=name, NUM_KEY=1024: a word or a number under a name that may mean something else.
    is_plain = len(value) < MIN_PLAIN and (value.isalpha() or value.isdigit())
    return is_plain and not is_strong and not name.lower().endswith("token")


# --- spellings


# Two entries: a test that sets a variable must not make every other call slow.
@lru_cache(maxsize=2)
def _needles(
    environment: tuple[tuple[str, str], ...], remembered: tuple[tuple[str, str], ...]
) -> tuple[Needle, ...]:
    """Return all spellings of the secrets in the environment, the longest secret first."""
    names = dict(remembered)
    for name, value in environment:
        for part in _secrets_in(name, value):
            if len(part) >= MIN_SECRET_LENGTH:
                names.setdefault(part, name)

    needles: dict[str, Needle] = {}
    for value in sorted(names, key=len, reverse=True):
        for needle in spellings(value, names[value]):
            needles.setdefault(needle.text, needle)
    return tuple(needles.values())


# --- search and replace


def _find(needles: tuple[Needle, ...], text: str, layer: Resolved | None) -> Iterator[_Hidden]:
    """Yield where the needles are in `text`; `layer`: it is the text of this layer."""
    for needle in needles:
        if needle.text not in text:
            continue

        start = text.find(needle.text)
        while start >= 0:
            end = start + len(needle.text)
            if not needle.is_whole or _is_whole(text, start, end):
                first, last = start, end
                if needle.is_base64:
                    first, last = _whole_token(text, start, end)
                if layer is not None:
                    first, last = layer.original(first, last)
                yield _Hidden(first, last, f"<{needle.name}>")
            start = text.find(needle.text, end)


def _find_short_in_base64(needles: tuple[Needle, ...], text: str) -> Iterator[_Hidden]:
    """Yield the base64 texts that hold a short secret, as Basic authentication does."""
    secrets = {needle.text: needle.name for needle in needles if len(needle.text) < MIN_ANYWHERE}
    if not secrets:
        return

    for match in _BASE64_TOKEN.finditer(text):
        token = match[0].rstrip("=").replace("-", "+").replace("_", "/")
        with contextlib.suppress(ValueError):
            content = b64decode(token + "=" * (-len(token) % 4))
            for secret, name in secrets.items():
                if secret.encode() in content:
                    yield _Hidden(*match.span(), f"<{name}>")


def _is_whole(text: str, start: int, end: int) -> bool:
    """Whether no letter, digit or underscore is next to [start, end)."""
    before, after = text[start - 1 : start], text[end : end + 1]
    return not any(c.isalnum() or c == "_" for c in before + after)


def _whole_token(text: str, start: int, end: int) -> tuple[int, int]:
    """Return the bounds of the base64 text around [start, end)."""
    while start > 0 and _BASE64_CHARACTER.match(text[start - 1]):
        start -= 1
    while end < len(text) and _BASE64_CHARACTER.match(text[end]):
        end += 1
    return start, end


def _hide(text: str, hidden: list[_Hidden]) -> str:
    """Return `text` with labels in place of its hidden parts; of those that overlap, one label."""
    merged: list[_Hidden] = []
    # The longest of those with one start first; a variable's name says more than its form.
    for part in sorted(hidden, key=lambda part: (part.start, -part.end, part.label == REDACTED)):
        if not merged or part.start >= merged[-1].end:
            merged.append(part)
        elif part.end > merged[-1].end:
            merged[-1] = merged[-1]._replace(end=part.end)

    pieces = []
    position = 0
    for start, end, label in merged:
        pieces += [text[position:start], label]
        position = end
    return "".join([*pieces, text[position:]])
