"""Inspect a dataset before training: columns, counts, lengths, duplicates, suspicious rows.

Reads every row once, a block at a time; writes nothing. Lengths are in characters: tokens need a
tokenizer, which `preview` and `pack-stats` have. The only array holds one length for each row.
"""

from __future__ import annotations

import json
import re
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from dist_ft.config.schema import Source
from dist_ft.core.errors import DataError
from dist_ft.core.printable import printable_line
from dist_ft.data.sources import readers
from dist_ft.data.sources.discovery import Row, Shard, discover_shards

BLOCK_BYTES = 16 * 2**20
MAX_HASHES = 5_000_000
"""Duplicates are searched among this many first rows; each needs a hash in memory."""
MAX_EXAMPLES = 5
"""Example rows listed for each problem."""
LONG_CHARACTERS = 100_000


@dataclass
class Inspection:
    """The result of an inspection.

    Attributes:
        num_shards: number of shards.
        num_rows: number of rows.
        num_bytes: bytes of all files as stored.
        kinds: number of shards of each kind.
        columns: "name: type" -> rows that have it.
        lengths: characters of each row (all text in it).
        num_duplicates: rows equal to an earlier row, letter for letter.
        suspicious: a problem or oddity -> number of rows that have it.
        examples: the first rows of each problem, as shard and row.
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

    def add_problem(self, problem: str, location: str) -> None:
        """Count a problem and remember the first rows that have it."""
        self.suspicious[problem] += 1
        examples = self.examples.setdefault(problem, [])
        if len(examples) < MAX_EXAMPLES:
            examples.append(location)


def inspect_paths(paths: Sequence[str]) -> Inspection:
    """Inspect the rows at paths, URLs, globs or hub names.

    Raises:
        DataError: a path matches nothing.
    """
    result = Inspection()
    hashes: set[int] = set()  # over all shards, as a row may be repeated in another file
    for shards in discover_shards([Source(path=path) for path in paths], "PATH"):
        for shard in shards:
            _inspect_shard(result, shard, hashes)
    return result


def _inspect_shard(result: Inspection, shard: Shard, hashes: set[int]) -> None:
    """Add a shard and its rows to the result; `hashes` are those of the rows so far."""
    result.num_shards += 1
    # the size of a hub shard is its number of rows
    if shard.kind != "hub":
        result.num_bytes += shard.size

    kind: str = shard.kind
    if shard.codec:
        kind = f"{shard.kind} ({shard.codec})"
    result.kinds[kind] += 1

    for number, row in enumerate(readers.iter_rows(shard, BLOCK_BYTES), 1):
        result.num_rows += 1
        location = f"{shard.url} row {number}"
        if isinstance(row, DataError):
            result.add_problem(_short_problem(row), location)
            continue

        for name, value in row.items():
            result.columns[f"{name}: {type(value).__name__}"] += 1
        _check_row(result, row, location)

        # The hash and not the row is kept: a set of millions of rows would not fit into memory.
        if len(hashes) < MAX_HASHES:
            row_hash = _hash_row(row)
            result.num_duplicates += row_hash in hashes
            hashes.add(row_hash)


def _short_problem(error: DataError) -> str:
    """Return the problem of a row's error, without its location, details and advice."""
    # What is left is the same for all rows with this problem, so that they are counted together.
    problem = str(error).split(": ", 1)[-1]
    return re.split(r" \(|;|\.( |$)", problem)[0]


def _hash_row(row: Row) -> int:
    """Return a hash of all values of a row."""
    import xxhash

    # sorted, because the order of columns makes no difference; str, because Parquet has dates
    canonical = json.dumps(row, sort_keys=True, default=str)
    return xxhash.xxh3_64_intdigest(canonical.encode())


def _check_row(result: Inspection, row: Row, location: str) -> None:
    """Add the length of a row, and its problems."""
    texts = list(_iter_texts(row))
    num_characters = sum(map(len, texts))
    result.lengths.append(num_characters)

    # rows of tokens have no text and are sound
    has_text = any(text.strip() for text in texts)
    if not row or (not has_text and not _has_numbers(row)):
        result.add_problem("empty: no text in any column", location)
    if num_characters > LONG_CHARACTERS:
        result.add_problem(f"longer than {LONG_CHARACTERS:,} characters", location)
    if any("\ufffd" in text for text in texts):
        result.add_problem("has U+FFFD: was decoded with a wrong encoding", location)
    if any("\x00" in text for text in texts):
        result.add_problem("has NUL characters", location)

    messages = row.get("messages")
    if isinstance(messages, list):
        _check_roles(result, messages, location)


def _check_roles(result: Inspection, messages: list[Any], location: str) -> None:
    """Add problems of the roles in a chat."""
    roles = []
    for message in messages:
        role = None
        if isinstance(message, dict):
            role = message.get("role")
        roles.append(role)

    if "assistant" not in roles:
        result.add_problem("messages without an assistant turn", location)

    # Several results of tools may follow one another, and system prompts may stand anywhere.
    turns = [role for role in roles if role not in ("system", "tool")]
    if any(role == next_role for role, next_role in pairwise(turns)):
        result.add_problem("messages with two turns of the same role in a row", location)


def _iter_texts(value: Any) -> Iterator[str]:
    """Yield all text in a value, nested values included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _iter_texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _iter_texts(item)


def _has_numbers(row: Row) -> bool:
    """Return whether a column holds a list of integers (tokens)."""
    for value in row.values():
        # the first item is enough: a list of tokens may be long
        if isinstance(value, list) and value and isinstance(value[0], int):
            return True
    return False


def format_inspection(result: Inspection) -> str:
    """Return an inspection as lines for people."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(result.kinds.items()))

    # quantiles need at least one value; there is none if no row could be decoded
    lengths = np.array(result.lengths or [0])
    low, median, p95, high = (int(value) for value in np.quantile(lengths, [0, 0.5, 0.95, 1]))

    duplicates = f"{result.num_duplicates:,}"
    if result.num_rows > MAX_HASHES:
        duplicates += f" (among the first {MAX_HASHES:,} rows)"

    lines = [
        f"shards      {result.num_shards} ({kinds}), {result.num_bytes:,} bytes",
        f"rows        {result.num_rows:,}",
        f"characters  min {low:,}, median {median:,}, 95th percentile {p95:,}, max {high:,} per "
        "row",
        f"duplicates  {duplicates}",
        "columns",
    ]
    for name, count in sorted(result.columns.items()):
        share = f"in {count:,} rows"
        if count == result.num_rows:
            share = "in all rows"
        lines.append(f"  {printable_line(name)}  {share}")

    if not result.suspicious:
        lines.append("suspicious  none")
    else:
        lines.append("suspicious")
    for problem, count in result.suspicious.most_common():
        examples = printable_line(", ".join(result.examples[problem]))
        lines.append(f"  {count:,} × {printable_line(problem)}, for example {examples}")
    return "\n".join(lines)
