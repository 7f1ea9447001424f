"""Mutations of bytes, of text by tokens, and of nested values.

All draw from the random generator they are given, and from nothing else.
"""

from __future__ import annotations

import copy
import datetime
import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

TOKEN = re.compile(r"\w+|\s+|[^\w\s]")

WORDS = (
    *("", " ", "0", "-1", "1", "2", "3.5", "1e5", "1e-400", "1e400", "nan", "-inf", ".inf", "inf"),
    *("007", "0x10", "1_000", "٣", "²", "true", "null", "~", "on", "no", "[]", "{}", "[", "{", ":"),
    *("999999999999999999999", "-9223372036854775809", "4294967296", "1" * 400, "9" * 5000),
    *(
        "a",
        "é",
        "日本",
        "\u202e",
        "\ufeff",
        "\x00",
        "\x07",
        "\x1b[31mred\x1b[0m",
        "\x1b]0;title\x07",
    ),
    *("\ud800", "\udcff", "a" * 300, "a" * 70_000, "%s%n", "{0.__class__}", "{text", "}}", "{{}}"),
    *("{prompt}", "{text}", "{% for %}", "{{ 1/0 }}", "$HOME", "`id`", "; true", "'", '"', "\\"),
    *("..", "../..", "../../../etc/passwd", "/", "//", ".", "~", "~nobody", "./-", "-", "--", "-h"),
    *("=", "==", "a=b", "=b", "a=", "a.b=c", "run", "run.name", "run.name=", "data.train=[]"),
    *("file://", "file:///dev/null", "/dev/null", "/dev/stdin", "/proc/self/mem", "memory://x"),
    *("s3://", "s3://bucket/x", "gs://b", "http://127.0.0.1:9/x", "://", "x://y", "hub://x"),
    *(
        "chain::file://x",
        "zip://a::b",
        "org/name",
        "org/name/more",
        "a:b",
        "os:system",
        "*",
        "**/*",
    ),
    *(
        "[a-",
        "a?b",
        "1..4",
        "4..1",
        "..",
        "1..",
        "0..0",
        "2024-01-01",
        "12:30:45",
        "!!python/name:os",
    ),
    *(
        "&a [*a]",
        "<<: 1",
        "? x",
        "- - -",
        "|",
        ">",
        "@",
        "%",
        "#",
        "!!binary x",
        "line\nbreak",
        "\t",
    ),
)
"""Words that programs are known to stumble over."""

CHUNKS = (
    *(
        b"",
        b"\x00",
        b"\xff",
        b"\xff\xfe",
        b"\xfe\xff",
        b"\xef\xbb\xbf",
        b"\xed\xa0\x80",
        b"\xc0\x80",
    ),
    *(
        b"\n",
        b"\r",
        b"\r\n",
        b"\t",
        b"\x1b[2J",
        b"\xe2\x80\xae",
        b"\xf4\x90\x80\x80",
        b"{",
        b"}",
        b"[",
    ),
    *(b"]", b'"', b"'", b":", b",", b"-", b"\\", b"\\ud800", b"null", b"NaN", b"1e999", b"-0"),
    *(b"[" * 5000, b'{"a":' * 3000, b"9" * 5000, b"A" * 70_000, b"\x00" * 64, b"\xff" * 8),
)
"""Pieces of bytes that parsers are known to stumble over."""


def value(rng: random.Random) -> Any:
    """Return an unusual value, of any type that YAML has."""
    kind = rng.randrange(8)
    if kind == 0:
        return rng.choice((None, True, False))
    if kind == 1:
        return rng.choice((0, -1, 1, 2, 3, 7, 63, 65, 2**31, 2**63, -(2**63), 2**64, 10**30))
    if kind == 2:
        infinity = float("inf")
        return rng.choice((0.0, -0.0, 0.5, -1.5, 1e-320, 1e308, infinity, -infinity, float("nan")))
    if kind == 3:
        return rng.choice(([], {}, [None], [[]], {"": ""}, {"a": {"b": {"c": []}}}, [1, "a", {}]))
    if kind == 4:
        dates = (datetime.date(2024, 1, 1), datetime.datetime(1, 1, 1), b"\xff\x00", {1: 2})
        return rng.choice((*dates, {None: None}, {True: 1}, [[1, 2], [3]], list(range(3000))))
    return rng.choice(WORDS)


def json_value(rng: random.Random) -> Any:
    """Return an unusual value that JSON has."""
    while True:
        drawn = value(rng)
        try:
            json.dumps(drawn)
        except (TypeError, ValueError):
            continue
        return drawn


def mutate_bytes(rng: random.Random, content: bytes) -> bytes:
    """Return `content` with one place changed."""
    at = rng.randrange(len(content) + 1)
    end = min(len(content), at + rng.choice((1, 1, 1, 2, 4, 8, 64)))
    kind = rng.randrange(8)
    if kind == 0 and content:
        at = min(at, len(content) - 1)
        flipped = content[at] ^ (1 << rng.randrange(8))
        return content[:at] + bytes([flipped]) + content[at + 1 :]
    if kind == 1:
        return content[:at] + bytes([rng.randrange(256)]) + content[at + 1 :]
    if kind == 2:
        return content[:at] + content[end:]
    if kind == 3:
        return content[:end] + content[at:end] + content[end:]
    if kind == 4:
        return content[:at]
    if kind == 5:
        other = rng.randrange(len(content) + 1)
        return content[:at] + content[other : other + 16] + content[end:]
    return content[:at] + rng.choice(CHUNKS) + content[rng.choice((at, end)) :]


def mutate_tokens(rng: random.Random, text: str, words: Sequence[str] = ()) -> str:
    """Return `text` with one token changed; `words`: tokens of its language."""
    tokens = TOKEN.findall(text)
    if not tokens:
        return rng.choice(WORDS)

    at, other = rng.randrange(len(tokens)), rng.randrange(len(tokens))
    kind = rng.randrange(7)
    if kind == 0:
        del tokens[at]
    elif kind == 1:
        tokens.insert(at, tokens[other])
    elif kind == 2:
        tokens[at], tokens[other] = tokens[other], tokens[at]
    elif kind == 3 and words:
        tokens[at] = rng.choice(words)
    elif kind == 4:
        tokens.insert(at, rng.choice(WORDS))
    elif kind == 5:
        # A typing error: two letters of a word.
        word = list(tokens[at])
        rng.shuffle(word)
        tokens[at] = "".join(word)
    else:
        tokens[at] = rng.choice(WORDS)
    return "".join(tokens)


class _Place(NamedTuple):
    """A value in a nested mapping or list."""

    container: Any
    key: Any


def _places(tree: Any) -> Iterator[_Place]:
    items: Any = ()
    if isinstance(tree, dict):
        items = tree.items()
    elif isinstance(tree, list):
        items = enumerate(tree)
    for key, item in items:
        yield _Place(tree, key)
        yield from _places(item)


def mutate_tree(
    rng: random.Random,
    tree: Any,
    names: Sequence[str] = (),
    draw: Callable[[random.Random], Any] = value,
) -> Any:
    """Return a copy of a nested value with one place changed.

    Args:
        rng: decides all.
        tree: mappings, lists and plain values.
        names: keys that mappings of this language have.
        draw: returns unusual values.
    """
    tree = copy.deepcopy(tree)
    places = list(_places(tree))
    if not places or rng.random() < 0.02:
        return draw(rng)

    place = rng.choice(places)
    container, key = place
    old = container[key]
    other = rng.choice(places)
    kind = rng.randrange(11)
    if kind == 0:
        del container[key]
    elif kind == 1:
        container[key] = [copy.deepcopy(old)]
    elif kind == 2:
        container[key] = {rng.choice((*names, "a")): copy.deepcopy(old)}
    elif kind == 3:
        container[key] = copy.deepcopy(other.container[other.key])
    elif kind == 4:
        container[key] = _changed_scalar(rng, old)
    elif kind == 5 and isinstance(container, dict):
        container[_new_key(rng, names)] = draw(rng)
    elif kind == 6 and isinstance(container, dict):
        container[_new_key(rng, names)] = container.pop(key)
    elif kind == 7 and isinstance(container, list):
        container.insert(rng.randrange(len(container) + 1), copy.deepcopy(old))
    else:
        container[key] = draw(rng)
    return tree


def _new_key(rng: random.Random, names: Sequence[str]) -> Any:
    if names and rng.random() < 0.6:
        return rng.choice(names)
    return rng.choice(WORDS)


def _changed_scalar(rng: random.Random, old: Any) -> Any:
    """Return a value near `old`, or the same one as another type."""
    if isinstance(old, bool) or old is None:
        return not old
    if isinstance(old, int | float):
        return rng.choice((old + 1, old - 1, -old, old * 10, old * 1_000_000, old / 2, str(old)))
    if isinstance(old, str):
        return mutate_tokens(rng, old)
    return str(old)
