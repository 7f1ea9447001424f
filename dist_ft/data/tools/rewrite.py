"""Write a run's training data again: as other shards, in another format, or as tokens.

There is one shard per block, named by number, so that an interrupted rewrite continues where it
stopped. `_source.json` is written first and identifies the data, so that shards of other data are
never mixed in. `_complete` is written last. Rows, their order and their number stay the same.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any

from dist_ft.core.errors import DataError
from dist_ft.core.json_documents import decode_json
from dist_ft.data.block import Block, ShardRange
from dist_ft.data.blocks.block_store import BlockStore
from dist_ft.data.blocks.token_cache import TokenizedBlock, cache_key
from dist_ft.data.sources import readers
from dist_ft.data.sources.discovery import Row, Shard
from dist_ft.data.tools.write import encode_jsonl, encode_parquet
from dist_ft.storage.documents import MAX_LARGE_BYTES
from dist_ft.storage.filesystem import Store

SOURCE, COMPLETE = "_source.json", "_complete"


def rewrite_blocks(
    blocks: BlockStore,
    out: Store,
    suffix: str,
    tokenize: bool,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Write the blocks as shards into `out`; return the number of shards written by this call.

    Args:
        blocks: the data.
        out: the folder to write into.
        suffix: parquet or jsonl.
        tokenize: write tokens and targets instead of rows.
        progress: called with (shards done, all shards).

    Raises:
        DataError: `out` holds the shards of other data, or other files.
    """
    # Not only shard names: the same names may hold another data set with as many blocks.
    source = _describe_source(blocks, suffix, tokenize)
    existing = set(out.list())
    is_same_source = False
    if SOURCE in existing:
        stored = out.read_at_most(SOURCE, MAX_LARGE_BYTES).decode("utf-8", "replace")
        is_same_source = _is_same_source(stored, source)
    if existing and not is_same_source:
        raise DataError(
            f"--out={out.redacted_url()}: holds shards that were written from other data or in "
            "another way. It must be an empty folder, or that of an interrupted call with the "
            "same arguments. Choose another folder."
        )

    total = len(blocks.blocks)
    names = [f"part-{number:05d}-of-{total:05d}.{suffix}" for number in range(total)]
    missing = [number for number, name in enumerate(names) if name not in existing]

    # Lazy: at most a few blocks are in memory.
    contents: Iterator[Any]
    if tokenize:
        contents = (block_to_table(block) for _, block in blocks.iter_blocks(missing))
    else:
        missing_blocks = [blocks.blocks[number] for number in missing]
        max_row_bytes = blocks.encoder.data.max_row_bytes
        contents = _iter_block_rows(missing_blocks, blocks.shards, max_row_bytes)

    # before the first shard, so that an interrupted call can be continued
    out.write(SOURCE, source.encode())
    for number, name in enumerate(names):
        if name not in existing:
            out.write(name, _encode(next(contents), suffix))
        progress(number + 1, total)

    out.write(COMPLETE, b"")
    return len(missing)


def _describe_source(blocks: BlockStore, suffix: str, tokenize: bool) -> str:
    """Return what the shards are written from, as JSON."""
    # tokens depend on the tokenizer, rows do not
    fingerprint = "rows"
    if tokenize:
        fingerprint = blocks.fingerprint

    keys = [cache_key(fingerprint, block, blocks.shards) for block in blocks.blocks]
    return json.dumps({"suffix": suffix, "tokenized": tokenize, "blocks": keys})


def _is_same_source(stored: str, source: str) -> bool:
    """Return whether a stored description is that of `source`.

    Only values are compared: version 0.1.0 spelled a key differently.
    """
    try:
        values = list(decode_json(stored).values())
    except (ValueError, AttributeError):
        return False
    return values == list(json.loads(source).values())


def block_to_table(block: TokenizedBlock) -> Any:
    """Return a block as an Arrow table of `input_ids` and `targets`; skipped rows are empty."""
    import pyarrow as pa

    offsets = pa.array(block.offsets, pa.int64())
    return pa.table(
        {
            "input_ids": pa.LargeListArray.from_arrays(offsets, pa.array(block.tokens)),
            "targets": pa.LargeListArray.from_arrays(offsets, pa.array(block.targets)),
        }
    )


def _iter_block_rows(
    blocks: Sequence[Block], shards: Sequence[Shard], max_row_bytes: int
) -> Iterator[list[Row]]:
    """Yield the rows of each block; a shard shared by several blocks is read in one pass."""
    ranges_left = [len(block.ranges) for block in blocks]
    rows: list[Row] = []

    for number, found in _read_in_passes(blocks, shards, max_row_bytes):
        if not isinstance(found, list):
            found = found.to_pylist()

        for row in found:
            # a copy must have every row, whatever data.bad_rows says
            if isinstance(row, DataError):
                raise row
            rows.append(row)

        ranges_left[number] -= 1
        if not ranges_left[number]:
            yield rows
            rows = []


def _read_in_passes(
    blocks: Sequence[Block], shards: Sequence[Shard], max_row_bytes: int
) -> Iterator[tuple[int, Any]]:
    """Yield (block, rows of a range) in order; consecutive ranges of a shard are one pass."""
    todo: list[tuple[int, ShardRange]] = []
    for number, block in enumerate(blocks):
        for part in block.ranges:
            todo.append((number, part))

    for shard, group in groupby(todo, key=lambda item: item[1].shard):
        numbers, ranges = zip(*group, strict=True)
        passes = readers.read_ranges(shards[shard], ranges, max_row_bytes)
        for number, (_, rows) in zip(numbers, passes, strict=True):
            yield number, rows


def _encode(rows: Any, suffix: str) -> bytes:
    """Return a list of rows, or an Arrow table, as the content of a file."""
    if suffix == "jsonl":
        if not isinstance(rows, list):
            rows = rows.to_pylist()
        return encode_jsonl(rows)

    if isinstance(rows, list):
        return encode_parquet(rows)

    import pyarrow.parquet

    # a table of tokens is written as it is: rows as Python objects would take much more memory
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(rows, buffer, compression="zstd", write_page_checksum=True)
    return buffer.getvalue()
