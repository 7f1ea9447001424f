"""Makes a failing input smaller while it fails in the same way."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace

from fuzz.inputs import Input

MAX_SECONDS = 30.0


def minimize(
    item: Input, fails: Callable[[Input], bool], max_seconds: float = MAX_SECONDS
) -> Input:
    """Return a smaller input for which `fails` is true, as it is for `item`."""
    until = time.monotonic() + max_seconds
    is_smaller = True
    while is_smaller and time.monotonic() < until:
        is_smaller = False
        for candidate in _smaller(item):
            if time.monotonic() > until:
                break
            if fails(candidate):
                item = candidate
                is_smaller = True
                break
    return item


def _smaller(item: Input) -> Iterator[Input]:
    """Yield inputs with less in them, the largest steps first."""
    for name in item.files:
        yield replace(
            item, files={other: item.files[other] for other in item.files if other != name}
        )

    # The first word is the command.
    for at in range(len(item.words) - 1, 0, -1):
        yield replace(item, words=item.words[:at] + item.words[at + 1 :])
    for at, word in enumerate(item.words):
        if len(word) > 40:
            yield replace(
                item, words=(*item.words[:at], word[: len(word) // 2], *item.words[at + 1 :])
            )

    for name, content in item.files.items():
        if isinstance(content, bytes):
            for shorter in _shorter(content):
                yield replace(item, files={**item.files, name: shorter})


def _shorter(content: bytes) -> Iterator[bytes]:
    """Yield content without some of its lines, or of its bytes if it is one line."""
    separator = b"\n" if content.count(b"\n") > 1 else b""
    parts = (
        content.split(b"\n") if separator else [content[at : at + 1] for at in range(len(content))]
    )
    size = len(parts) // 2
    while size and len(parts) > 1:
        for start in range(0, len(parts), size):
            yield separator.join(parts[:start] + parts[start + size :])
        size //= 2
        if not separator and len(parts) // max(1, size) > 64:
            return
