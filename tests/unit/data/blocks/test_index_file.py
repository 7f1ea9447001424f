"""A stored index is what a run wrote, or one line: what plans the steps computes with its numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import xxhash

from dist_ft.core.errors import DataError
from dist_ft.data.block import Block, ShardRange
from dist_ft.data.blocks import index_file
from dist_ft.data.blocks.index import Index
from dist_ft.data.blocks.segments import BlockStats
from dist_ft.data.sources.discovery import Shard
from dist_ft.storage.filesystem import Store

STATS = BlockStats(3, (3,), 3, 1, 30, 20, 0, 0, 12, 1, 1, "a.jsonl row 2: bad", "text", "00ff")
INDEX = Index(
    shards=(Shard("a.jsonl", "jsonl", 100, "v1"),),
    shard_sources=(0,),
    blocks=(Block(0, (ShardRange(0, 0, -1, 100),)),),
    block_stats=(STATS,),
    recipe={
        "encoder": "e",
        "overlong": "error",
        "pack": True,
        "block_mib": 16.0,
        "sequence_length": 16,
        "max_samples": 0,
    },
)


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the body of an index and give it a correct checksum, as an attacker would."""
    _, body = path.read_text().splitlines()
    content = json.loads(body)
    change(content)
    body = json.dumps(content)
    checksum = xxhash.xxh3_128_hexdigest(body.encode())
    header = json.dumps({"format": index_file.FORMAT_VERSION, "checksum": checksum})
    path.write_text(f"{header}\n{body}\n")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    index_file.save(INDEX, Store(str(tmp_path)), "data.train")
    return tmp_path / "data.train.json"


def test_round_trip(path: Path) -> None:
    assert index_file.load(Store(str(path.parent)), "data.train") == INDEX
    rewrite(path, lambda content: None)
    assert index_file.load(Store(str(path.parent)), "data.train") == INDEX


def set_stat(field: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        content["measures"][0][content["measure"].index(field)] = value

    return change


CHANGES: dict[str, Callable[[dict[str, Any]], None]] = {
    "rows of text": set_stat("num_rows", "3"),
    "negative rows": set_stat("num_rows", -3),
    "too many rows": set_stat("num_rows", 2**70),
    "tokens of null": set_stat("num_tokens", None),
    "parts of text": set_stat("part_rows", ["a"]),
    "parts that are none": set_stat("part_rows", 5),
    "a checksum that is a number": set_stat("checksum", 5),
    "no blocks": lambda content: content.update(blocks=[]),
    "a block of another shard": lambda content: content["blocks"][0][1][0].__setitem__(0, 7),
    "a block of a negative shard": lambda content: content["blocks"][0][1][0].__setitem__(0, -1),
    "a block that is none": lambda content: content.update(blocks=[5]),
    "a shard of another kind": lambda content: content["shards"][0].__setitem__(1, "pickle"),
    "a shard without a name": lambda content: content["shards"][0].__setitem__(0, None),
    "a shard of a negative size": lambda content: content["shards"][0].__setitem__(2, -1),
    "no recipe": lambda content: content.pop("recipe"),
    "a recipe that is none": lambda content: content.update(recipe=[]),
    "sources that are none": lambda content: content.update(shard_sources=["a"]),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_values_that_no_index_has_are_one_line(
    change: Callable[[dict[str, Any]], None], path: Path
) -> None:
    rewrite(path, change)
    with pytest.raises(
        DataError, match=r"the stored index is damaged \(.*Remove the file"
    ) as error:
        index_file.load(Store(str(path.parent)), "data.train")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"{}\n{}\n", b"[1]\n[2]\n", b"\xff\n\xff", b"[" * 100_000 + b"\n{}\n"]
)
def test_what_is_no_index_is_one_line(content: bytes, path: Path) -> None:
    path.write_bytes(content)
    with pytest.raises(DataError, match="the stored index is damaged"):
        index_file.load(Store(str(path.parent)), "data.train")
