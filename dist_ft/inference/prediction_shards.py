"""Predictions of many rows as a folder of shards: cut by the input alone, so any number of workers writes the same.

Guarantees: shard i holds the rows of part i of the input, in their order; it is written whole or not at all, and one
that is there is not made again, so a start that was killed is gone on with. A folder of another model, other rows or
another format is refused. One process makes them here; `ray_data` has many do it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from dist_ft.core.errors import DataError
from dist_ft.data.block import ShardRange
from dist_ft.data.sources import readers
from dist_ft.data.sources.discovery import Row, Shard
from dist_ft.data.tools.write import encode_jsonl, encode_parquet
from dist_ft.inference.predict import Predictor
from dist_ft.storage.filesystem import Store

PART_BYTES = 2 * 2**20
"""Of input text, about, in a part."""
MOST_ROWS = 2**24
"""Of a part, and more: what is drawn for a row follows from its part and its place there."""
ABOUT = "_predictions.json"
"""File of the folder that says of which model and rows its shards are; readers of data pass over such names."""
ENCODERS = {"jsonl": encode_jsonl, "parquet": encode_parquet}

Task = dict[str, Any]
"""A part of the input: its number, shard, place there, and the name of the shard it becomes."""


def cut(shards: Sequence[Shard], suffix: str, part_bytes: int = PART_BYTES) -> list[Task]:
    """Return the parts of the input in order; each is JSON values, for it may travel to another machine."""
    parts = [
        part
        for number, shard in enumerate(shards)
        for part in readers.split_into_ranges(shard, number, part_bytes)
    ]
    return [
        {
            "shard": asdict(shards[part.shard]),
            "part": asdict(part),
            "name": f"part-{number:05d}-of-{len(parts):05d}.{suffix}",
        }
        for number, part in enumerate(parts)
    ]


def missing(store: Store, tasks: Sequence[Task], version: str) -> list[Task]:
    """Return the parts that are not written yet; the first start notes which model and rows the folder is of.

    Raises DataError if it is of others.
    """
    wanted = {
        "model": version,
        "shards": [task["shard"] for task in tasks],
        "names": [task["name"] for task in tasks],
    }
    there = set(store.list())
    if ABOUT in there:
        if json.loads(store.read(ABOUT)) != wanted:
            raise DataError(
                f"--out={store.shown()}: holds predictions of another model, of other rows or in another "
                "format; the folder of the same command is gone on with; name another, or remove it"
            )
    elif there:
        raise DataError(
            f"--out={store.shown()}: the folder holds other files; a new or an empty one is allowed; name "
            "another"
        )
    else:
        store.write(ABOUT, json.dumps(wanted).encode())
    return [task for task in tasks if task["name"] not in there]


def make(predictor: Predictor, store: Store, task: Task) -> int:
    """Read the rows of a part, ask the model, write its shard; return how many rows."""
    rows: list[Row] = []
    shard = Shard(**task["shard"])
    for _, found in readers.read_ranges(shard, [ShardRange(**task["part"])]):
        for row in found if isinstance(found, list) else found.to_pylist():
            if isinstance(row, DataError):
                raise row
            rows.append(row)
    number = int(task["name"].split("-")[1])
    said = predictor.predict(rows, number * MOST_ROWS) if rows else []
    suffix = task["name"].rsplit(".", 1)[1]
    store.write(
        task["name"],
        ENCODERS[suffix](
            [{**row, "prediction": value} for row, value in zip(rows, said, strict=True)]
        ),
    )
    return len(rows)
