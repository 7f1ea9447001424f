"""What lies in a data set before anything is trained on it: columns, counts, lengths, duplicates, suspicious rows.

Reads every row once, a block at a time; nothing is written. Lengths are in characters: tokens need a tokenizer, which
`preview` and `pack-stats` have.
"""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from dist_ft.config.schema import Source
from dist_ft.core.errors import DataError
from dist_ft.data.sources import readers
from dist_ft.data.sources.discovery import Row, discover_shards

BLOCK_BYTES = 16 * 2**20
MAX_HASHES = 5_000_000
"""Duplicates are looked for among so many first rows: a hash each."""
MAX_EXAMPLES = 5
LONG_CHARACTERS = 100_000


@dataclass
class Inspection:
    """What was found.

    Attributes:
        num_shards, num_rows, num_bytes: how much there is; bytes as they lie.
        kinds: shards of each kind.
        columns: "name: type" -> rows that have it.
        lengths: characters of each row (all text in it).
        num_duplicates: rows that came before, letter for letter.
        suspicious: what is wrong or odd -> how many rows.
        examples: the first rows of each, as shard and row.
    """

    num_shards: int = 0
    num_rows: int = 0
    num_bytes: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    columns: Counter[str] = field(default_factory=Counter)
    lengths: array[int] = field(default_factory=lambda: array("q"))
    num_duplicates: int = 0
    suspicious: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def note(self, what: str, where: str) -> None:
        """Count something odd and remember where it was seen first."""
        self.suspicious[what] += 1
        places = self.examples.setdefault(what, [])
        if len(places) < MAX_EXAMPLES:
            places.append(where)


def inspect_paths(paths: Sequence[str]) -> Inspection:
    """Return what lies at paths, URLs, globs or hub names. Raises DataError where they name nothing."""
    import xxhash

    found, seen = Inspection(), set[int]()
    for shards in discover_shards([Source(path=path) for path in paths], "PATH"):
        for shard in shards:
            found.num_shards += 1
            found.num_bytes += shard.size if shard.kind != "hub" else 0
            found.kinds[shard.kind + (f" ({shard.codec})" if shard.codec else "")] += 1
            for number, row in enumerate(readers.iter_rows(shard, BLOCK_BYTES), 1):
                found.num_rows += 1
                where = f"{shard.url} row {number}"
                if isinstance(row, DataError):
                    found.note(str(row).split(": ", 1)[-1].split(" (")[0].split(";")[0], where)
                    continue
                found.columns.update(
                    f"{name}: {type(value).__name__}" for name, value in row.items()
                )
                _judge(found, row, where)
                if len(seen) < MAX_HASHES:
                    digest = xxhash.xxh3_64_intdigest(
                        json.dumps(row, sort_keys=True, default=str).encode()
                    )
                    found.num_duplicates += digest in seen
                    seen.add(digest)
    return found


def _judge(found: Inspection, row: Row, where: str) -> None:
    """Note the length of a row, and what is odd about it."""
    texts = list(_texts(row))
    size = sum(map(len, texts))
    found.lengths.append(size)
    if not row or (not any(text.strip() for text in texts) and not _holds_numbers(row)):
        found.note("empty: no text in any column", where)
    if size > LONG_CHARACTERS:
        found.note(f"longer than {LONG_CHARACTERS:,} characters", where)
    if any("\ufffd" in text for text in texts):
        found.note("has U+FFFD: decoded with a wrong encoding before", where)
    if any("\x00" in text for text in texts):
        found.note("has NUL characters", where)
    messages = row.get("messages")
    if isinstance(messages, list):
        roles = [item.get("role") if isinstance(item, dict) else None for item in messages]
        if "assistant" not in roles:
            found.note("messages without an assistant turn", where)
        turns = [role for role in roles if role not in ("system", "tool")]
        if any(a == b for a, b in pairwise(turns)):
            found.note("messages in which a role speaks twice in a row", where)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def _holds_numbers(row: Row) -> bool:
    return any(
        isinstance(value, list) and value and isinstance(value[0], int) for value in row.values()
    )


def format_inspection(found: Inspection) -> str:
    """Return the lines that tell a person about it."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(found.kinds.items()))
    low, median, p95, high = (
        int(v) for v in np.quantile(np.array(found.lengths or [0]), [0, 0.5, 0.95, 1])
    )
    lines = [
        f"shards      {found.num_shards} ({kinds}), {found.num_bytes:,} bytes",
        f"rows        {found.num_rows:,}",
        f"characters  min {low:,}, median {median:,}, 95% {p95:,}, max {high:,} a row",
        f"duplicates  {found.num_duplicates:,}"
        + (f" (among the first {MAX_HASHES:,} rows)" if found.num_rows > MAX_HASHES else ""),
        "columns",
    ]
    lines += [
        f"  {name}  {'in all rows' if count == found.num_rows else f'in {count:,} rows'}"
        for name, count in sorted(found.columns.items())
    ]
    lines.append("suspicious  none" if not found.suspicious else "suspicious")
    for what, count in found.suspicious.most_common():
        lines.append(f"  {count:,} × {what}, such as {', '.join(found.examples[what])}")
    return "\n".join(lines)
