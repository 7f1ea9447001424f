"""The stored form of an index: one JSON file in the run's folder, protected by a checksum."""

from __future__ import annotations

import json
from dataclasses import asdict, fields

from dist_ft.core.errors import DataError
from dist_ft.core.logs import redact
from dist_ft.data.block import Block, ShardRange
from dist_ft.data.blocks.index import Index
from dist_ft.data.blocks.segments import BlockStats
from dist_ft.data.sources.discovery import Shard
from dist_ft.storage.filesystem import Store

FORMAT = 2
STORED_NAMES = {"num_segments": "num_pieces", "rows_per_range": "part_rows"}
"""Fields of `BlockStats` that files of this format store by another name."""


def save(index: Index, store: Store, name: str) -> None:
    """Write `<name>.json`: recipe, shards and blocks with their statistics."""
    import xxhash

    field_names = [field.name for field in fields(BlockStats)]
    body = json.dumps(
        {
            "recipe": index.recipe,
            "shards": [list(asdict(shard).values()) for shard in index.shards],
            "shard_sources": index.shard_sources,
            "blocks": [_block_values(block) for block in index.blocks],
            "measure": [STORED_NAMES.get(field, field) for field in field_names],
            "measures": [
                [getattr(stats, field) for field in field_names] for stats in index.block_stats
            ],
        }
    )
    header = json.dumps({"format": FORMAT, "checksum": xxhash.xxh3_128_hexdigest(body.encode())})
    store.write(f"{name}.json", f"{header}\n{body}\n".encode())


def load(store: Store, name: str) -> Index | None:
    """Return a stored index, or None if it does not exist.

    Raises:
        DataError: it is damaged or of another format.
    """
    import xxhash

    if not store.exists(f"{name}.json"):
        return None

    where = redact(store.full_url(f"{name}.json"))
    try:
        header_line, _, body = store.read(f"{name}.json").partition(b"\n")
        header = json.loads(header_line)
        if header["format"] != FORMAT:
            raise DataError(
                f"{where}: has format {header['format']}. This version reads format {FORMAT}. "
                "Remove the file to rebuild the index."
            )
        body = body.removesuffix(b"\n")
        if xxhash.xxh3_128_hexdigest(body) != header["checksum"]:
            raise ValueError("the checksum differs")
        content = json.loads(body)

        return Index(
            shards=tuple(Shard(*values) for values in content["shards"]),
            shard_sources=tuple(content["shard_sources"]),
            blocks=tuple(_block(source, ranges) for source, ranges in content["blocks"]),
            block_stats=tuple(
                _block_stats(content["measure"], values) for values in content["measures"]
            ),
            recipe=content["recipe"],
        )
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{where}: the stored index is damaged ({error}). Remove the file to rebuild the index "
            "from the same shards."
        ) from error


def _block_values(block: Block) -> list[object]:
    """Return a block as [source, [values of each range]]."""
    return [block.source, [list(asdict(shard_range).values()) for shard_range in block.ranges]]


def _block(source: int, ranges: list[list[int]]) -> Block:
    return Block(source, tuple(ShardRange(*values) for values in ranges))


def _block_stats(stored_names: list[str], values: list[object]) -> BlockStats:
    field_names = {stored: field for field, stored in STORED_NAMES.items()}
    by_name: dict[str, object] = {
        field_names.get(stored, stored): value
        for stored, value in zip(stored_names, values, strict=True)
    }
    by_name["rows_per_range"] = tuple(by_name["rows_per_range"])  # type: ignore[arg-type]
    return BlockStats(**by_name)  # type: ignore[arg-type]
