"""Read and write an index as one file in the run's folder.

The file has two lines of JSON: a header (format version, checksum of the body) and the body.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any, get_args

from dist_ft.core.errors import DataError
from dist_ft.core.json_documents import decode_json
from dist_ft.core.logs import redact
from dist_ft.data.block import Block, ShardRange
from dist_ft.data.blocks.index import Index
from dist_ft.data.blocks.segments import BlockStats
from dist_ft.data.sources.discovery import Shard, ShardKind
from dist_ft.storage.documents import MAX_LARGE_BYTES
from dist_ft.storage.filesystem import Store

FORMAT_VERSION = 2
STORED_NAMES = {"num_segments": "num_pieces", "rows_per_range": "part_rows"}
"""Field of `BlockStats` -> its name in the file, where they differ."""


def save(index: Index, store: Store, name: str) -> None:
    """Write `index` to `<name>.json`: the recipe, shards, and blocks with their statistics.

    Args:
        index: the index.
        store: the run's folder.
        name: path of the file in `store`, without .json.
    """
    import xxhash

    # Values without their names, which are stored once: an index may have many thousands of blocks.
    field_names = [field.name for field in fields(BlockStats)]
    stats_values = []
    for stats in index.block_stats:
        stats_values.append([getattr(stats, field) for field in field_names])

    body = json.dumps(
        {
            "recipe": index.recipe,
            "shards": [list(asdict(shard).values()) for shard in index.shards],
            "shard_sources": index.shard_sources,
            "blocks": [_block_values(block) for block in index.blocks],
            "measure": [STORED_NAMES.get(field, field) for field in field_names],
            "measures": stats_values,
        }
    )
    header = json.dumps(
        {"format": FORMAT_VERSION, "checksum": xxhash.xxh3_128_hexdigest(body.encode())}
    )
    store.write(f"{name}.json", f"{header}\n{body}\n".encode())


def load(store: Store, name: str) -> Index | None:
    """Return the index stored as `<name>.json`, or None if the file does not exist.

    Raises:
        DataError: the file is damaged or has another format version.
    """
    import xxhash

    if not store.exists(f"{name}.json"):
        return None

    url = redact(store.full_url(f"{name}.json"))
    try:
        header_line, _, body = store.read_at_most(f"{name}.json", MAX_LARGE_BYTES).partition(b"\n")
        header = decode_json(header_line)
        # Before the checksum: the file of another version must not be reported as damaged.
        if header["format"] != FORMAT_VERSION:
            raise DataError(
                f"{url}: has format {header['format']}. This version reads format "
                f"{FORMAT_VERSION}. Remove the file to rebuild the index."
            )

        body = body.removesuffix(b"\n")
        if xxhash.xxh3_128_hexdigest(body) != header["checksum"]:
            raise ValueError("the checksum differs")

        return _parse_index(decode_json(body))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{url}: the stored index is damaged ({error}). Remove the file to rebuild the index "
            "from the same shards."
        ) from error


def _parse_index(content: dict[str, Any]) -> Index:
    """Return the index from the content of the file's body."""
    # JSON has no tuples. An index is compared with what discovery finds, which consists of them.
    shards = [Shard(*values) for values in content["shards"]]
    shard_sources = tuple(content["shard_sources"])
    blocks = [_parse_block(source, ranges) for source, ranges in content["blocks"]]

    block_stats = []
    for values in content["measures"]:
        block_stats.append(_parse_block_stats(content["measure"], values))

    index = Index(
        shards=tuple(shards),
        shard_sources=shard_sources,
        blocks=tuple(blocks),
        block_stats=tuple(block_stats),
        recipe=content["recipe"],
    )
    _check_types(index)
    return index


def _check_types(index: Index) -> None:
    """Raise ValueError unless every number and text of an index is one.

    The checksum shows damage, but not who wrote the file; what plans the steps computes with it.
    """
    _require(isinstance(index.recipe, dict), "a recipe that is none")
    _require(len(index.shard_sources) == len(index.shards), "the number of shard sources differs")
    _require(len(index.block_stats) == len(index.blocks), "the number of blocks differs")

    for shard in index.shards:
        is_shard = isinstance(shard.url, str) and isinstance(shard.version, str)
        _require(is_shard and shard.kind in get_args(ShardKind), f"shard {shard!r:.80}")
    sizes = [shard.size for shard in index.shards]
    _require_counts("shards", [*sizes, *index.shard_sources])

    for block in index.blocks:
        for part in block.ranges:
            counts = [block.source, part.shard, part.start, part.stop + 1, part.group + 1]
            _require_counts("blocks", counts)
            _require(part.shard < len(index.shards), f"shard {part.shard} does not exist")

    for stats in index.block_stats:
        counts = []
        for field in fields(BlockStats):
            value = getattr(stats, field.name)
            if field.type == "str":
                _require(isinstance(value, str), f"{field.name} is no text")
            elif field.type == "int":
                counts.append(value)
        _require_counts("statistics", [*counts, *stats.rows_per_range])


def _require(holds: bool, problem: str) -> None:
    if not holds:
        raise ValueError(problem)


def _require_counts(name: str, values: Sequence[object]) -> None:
    for value in values:
        is_count = isinstance(value, int) and 0 <= value < 2**62
        _require(is_count, f"{name}: {value!r:.40} is no count")


def _block_values(block: Block) -> list[object]:
    """Return a block as [source, [[shard, start, stop, num_bytes, group] of each range]]."""
    ranges = [list(asdict(shard_range).values()) for shard_range in block.ranges]
    return [block.source, ranges]


def _parse_block(source: int, ranges: list[list[int]]) -> Block:
    """Return the block of a source from the values of its ranges."""
    return Block(source, tuple(ShardRange(*values) for values in ranges))


def _parse_block_stats(stored_names: list[str], values: list[object]) -> BlockStats:
    """Return the statistics of a block from its stored values, one for each stored name."""
    # fields were renamed after 0.1.0, but runs of it are resumed with their stored index
    field_by_stored_name = {stored: field for field, stored in STORED_NAMES.items()}

    by_name: dict[str, object] = {}
    for stored, value in zip(stored_names, values, strict=True):
        by_name[field_by_stored_name.get(stored, stored)] = value

    by_name["rows_per_range"] = tuple(by_name["rows_per_range"])  # type: ignore[arg-type]
    return BlockStats(**by_name)  # type: ignore[arg-type]
