"""Writes a run's training data again as it would be read: other shards, another format, or tokens made ahead.

One shard a block, named by number, so that a writing that was cut off goes on where it stopped; `_source.json`, written
first, says what they are made of, so that shards of other data are never mixed in, and `_complete`, written last, that
all are there. Rows, their order and their number stay.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any

from dist_ft.core.errors import DataError
from dist_ft.data.block import Block
from dist_ft.data.blocks.block_store import BlockStore
from dist_ft.data.blocks.token_cache import TokenizedBlock, cache_key
from dist_ft.data.sources import readers
from dist_ft.data.sources.discovery import Row, Shard
from dist_ft.data.tools.write import encode_jsonl, encode_parquet
from dist_ft.storage.filesystem import Store

SOURCE, COMPLETE = "_source.json", "_complete"


def rewrite_blocks(
    blocks: BlockStore,
    out: Store,
    suffix: str,
    tokenize: bool,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Write the blocks as shards of `suffix` (parquet or jsonl) into `out`; return how many were written now.

    Raises:
        DataError: `out` holds the shards of other data, or of another cut.
    """
    about = json.dumps(
        {
            "suffix": suffix,
            "tokenised": tokenize,
            "blocks": [
                cache_key(blocks.fingerprint if tokenize else "rows", block, blocks.shards)
                for block in blocks.blocks
            ],
        }
    )
    there = set(out.list())
    if (SOURCE in there and out.read(SOURCE).decode() != about) or (SOURCE not in there and there):
        raise DataError(
            f"--out={out.redacted_url()}: holds shards that were written from other data or in another way; an "
            "empty folder, or the same call again, is allowed; choose another folder"
        )
    total = len(blocks.blocks)
    names = [f"part-{number:05d}-of-{total:05d}.{suffix}" for number in range(total)]
    missing = [number for number, name in enumerate(names) if name not in there]
    made: Iterator[Any] = (
        (block_to_table(block) for _, block in blocks.iter_blocks(missing))
        if tokenize
        else _rows([blocks.blocks[number] for number in missing], blocks.shards)
    )
    out.write(SOURCE, about.encode())
    for number, name in enumerate(names):
        if name not in there:
            out.write(name, _encode(next(made), suffix))
        progress(number + 1, total)
    out.write(COMPLETE, b"")
    return len(missing)


def block_to_table(block: TokenizedBlock) -> Any:
    """Return a block as an Arrow table of `input_ids` and `targets`; rows that were left out stay empty."""
    import pyarrow as pa

    offsets = pa.array(block.offsets, pa.int64())
    return pa.table(
        {
            "input_ids": pa.LargeListArray.from_arrays(offsets, pa.array(block.tokens)),
            "targets": pa.LargeListArray.from_arrays(offsets, pa.array(block.targets)),
        }
    )


def _rows(blocks: Sequence[Block], shards: Sequence[Shard]) -> Iterator[list[Row]]:
    """Yield the rows of each block; a shard that several have parts of is read in one pass."""
    todo = [(number, part) for number, block in enumerate(blocks) for part in block.ranges]
    left, found = [len(block.ranges) for block in blocks], list[Row]()
    for shard, group in groupby(todo, key=lambda item: item[1].shard):
        numbers, parts = zip(*group, strict=True)
        for number, (_, rows) in zip(numbers, readers.read_ranges(shards[shard], parts), strict=True):
            for row in rows if isinstance(rows, list) else rows.to_pylist():
                if isinstance(row, DataError):
                    raise row
                found.append(row)
            left[number] -= 1
            if not left[number]:
                yield found
                found = []


def _encode(rows: Any, suffix: str) -> bytes:
    if suffix == "jsonl":
        return encode_jsonl(rows if isinstance(rows, list) else rows.to_pylist())
    if isinstance(rows, list):
        return encode_parquet(rows)
    import pyarrow.parquet

    buffer = io.BytesIO()
    pyarrow.parquet.write_table(rows, buffer, compression="zstd", write_page_checksum=True)
    return buffer.getvalue()
