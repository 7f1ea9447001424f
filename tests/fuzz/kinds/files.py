"""Mutations of one file: by its bytes, by its JSON values, or something else in its place."""

from __future__ import annotations

import json
import random
from typing import Any

from fuzz import mutate
from fuzz.inputs import File, Special

HEADER_BYTES = 8
"""safetensors: the length of the header, which is JSON."""


def mutated(rng: random.Random, content: bytes, names: tuple[str, ...] = ()) -> File:
    """Return a mutation of a file's content; `names`: keys that such files have."""
    kind = rng.random()
    if kind < 0.06:
        return rng.choice(list(Special))
    if kind < 0.1:
        return rng.choice((b"", b"\n", b"null", b"[]", b"{}", b"0", b'""', b"\x00" * 100))
    if kind < 0.65:
        changed = _mutated_values(rng, content, names)
        if changed is not None:
            return changed

    for _ in range(rng.choice((1, 1, 2, 5))):
        content = mutate.mutate_bytes(rng, content)
    return content


def _mutated_values(rng: random.Random, content: bytes, names: tuple[str, ...]) -> bytes | None:
    """Return content with changed JSON values: of a file, of one line, of a header; None: no JSON."""
    if (header := header_of(content)) is not None:
        values = mutated_json(rng, header, names)
        return with_header(values, content[HEADER_BYTES + len_of_header(content) :])

    try:
        return _dump(mutated_json(rng, json.loads(content), names))
    except (ValueError, RecursionError):
        pass

    lines = content.split(b"\n")
    at = rng.randrange(len(lines))
    try:
        lines[at] = _dump(mutated_json(rng, json.loads(lines[at]), names))
    except (ValueError, RecursionError):
        return None
    return b"\n".join(lines)


def mutated_json(rng: random.Random, values: Any, names: tuple[str, ...]) -> Any:
    """Return JSON values with one to three changes."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        values = mutate.mutate_tree(rng, values, names, mutate.json_value)
    return values


def len_of_header(content: bytes) -> int:
    """Return the length of the header that a safetensors file states."""
    return int.from_bytes(content[:HEADER_BYTES], "little")


def header_of(content: bytes) -> Any | None:
    """Return the header of a safetensors file; None if the content is none."""
    length = len_of_header(content)
    if not 2 <= length <= len(content) - HEADER_BYTES:
        return None
    try:
        return json.loads(content[HEADER_BYTES : HEADER_BYTES + length])
    except (ValueError, RecursionError):
        return None


def with_header(header: Any, values: bytes) -> bytes:
    """Return a safetensors file."""
    text = _dump(header)
    return len(text).to_bytes(HEADER_BYTES, "little") + text + values


def _dump(values: Any) -> bytes:
    return json.dumps(values, indent=None, default=str).encode("utf-8", "surrogatepass")
