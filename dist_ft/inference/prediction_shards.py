"""Predictions of many rows as a folder of shards, the same for any number of workers.

How rows are split into shards follows from the input alone.

Guarantees: shard i holds the rows of part i of the input, in their order; it is written whole or
not at all, and a shard that exists is not written again, so the same command resumes. A folder of
another model, other rows or another format is refused. One process writes the shards here;
`ray_data` has many do it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dist_ft.core.errors import DataError
from dist_ft.data.block import ShardRange
from dist_ft.data.sources import readers
from dist_ft.data.sources.discovery import Row, Shard
from dist_ft.data.tools.write import encode_jsonl, encode_parquet
from dist_ft.inference.predict import Predictor
from dist_ft.storage.documents import read_json
from dist_ft.storage.filesystem import Store

PART_BYTES = 2 * 2**20
"""Approximate bytes of input text in a part."""
MAX_PART_ROWS = 2**24
"""More rows than a part has: random draws for a row follow from its part and its place there."""
INFO_FILE = "_predictions.json"
"""File of the folder with the model and rows of its shards; readers of data skip such names."""
ENCODERS = {"jsonl": encode_jsonl, "parquet": encode_parquet}


@dataclass(frozen=True)
class ShardTask:
    """A part of the input and the shard its predictions become.

    Attributes:
        number: number of the part, from 0.
        name: file name of the shard.
        shard, part: where the rows are read.
    """

    number: int
    name: str
    shard: Shard
    part: ShardRange

    @property
    def suffix(self) -> str:
        """Format of the shard: jsonl or parquet."""
        return self.name.rsplit(".", 1)[1]

    def to_json(self) -> str:
        """Return the task as text, to send to another machine."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> ShardTask:
        """Return the task that `to_json` wrote."""
        values = json.loads(text)
        shard, part = Shard(**values["shard"]), ShardRange(**values["part"])
        return cls(values["number"], values["name"], shard, part)


def split_input(
    shards: Sequence[Shard], suffix: str, part_bytes: int = PART_BYTES
) -> list[ShardTask]:
    """Return a task for each part of the input, in order."""
    parts = []
    for number, shard in enumerate(shards):
        parts += readers.split_into_ranges(shard, number, part_bytes)

    # Names contain the number of parts, so all parts come first.
    tasks = []
    for number, part in enumerate(parts):
        name = f"part-{number:05d}-of-{len(parts):05d}.{suffix}"
        tasks.append(ShardTask(number, name, shards[part.shard], part))

    return tasks


def missing_tasks(store: Store, tasks: Sequence[ShardTask], version: str) -> list[ShardTask]:
    """Return the tasks whose shards do not exist yet.

    The first start notes the model and rows of the folder.

    Raises DataError if the folder is of another model or other rows.
    """
    # URL, size and version of the input's shards stand for its rows; the names of the output
    # contain the format and the number of parts.
    info = {
        "model": version,
        "shards": [asdict(task.shard) for task in tasks],
        "names": [task.name for task in tasks],
    }

    # A folder without the file was not written by this command: another's shards are not mixed in.
    existing = set(store.list())
    if INFO_FILE in existing:
        if read_json(store, INFO_FILE) != info:
            raise DataError(
                f"--out={store.redacted_url()}: holds predictions of another model, of other rows "
                "or in another format. Only the folder of the same command can be resumed. Name "
                "another folder, or remove this one."
            )
    elif existing:
        raise DataError(
            f"--out={store.redacted_url()}: the folder holds other files. A new or an empty "
            "folder is allowed. Name another."
        )
    else:
        # Before the first shard, so that a killed command leaves no shards of an unknown model.
        store.write(INFO_FILE, json.dumps(info).encode())

    return [task for task in tasks if task.name not in existing]


def write_shard(predictor: Predictor, store: Store, task: ShardTask) -> int:
    """Read the rows of a part, predict, and write the shard; return the number of rows."""
    rows: list[Row] = []
    for _, chunk in readers.read_ranges(task.shard, [task.part]):
        # Tables are read as Arrow, text formats as lists that hold errors in the place of bad rows.
        if not isinstance(chunk, list):
            chunk = chunk.to_pylist()

        for row in chunk:
            if isinstance(row, DataError):
                raise row
            rows.append(row)

    # The seed of a row follows from its part, not from the worker or the order of the parts.
    predictions: list[dict[str, Any]] = []
    if rows:
        predictions = predictor.predict(rows, task.number * MAX_PART_ROWS)

    content = []
    for row, prediction in zip(rows, predictions, strict=True):
        content.append({**row, "prediction": prediction})

    # One write of the whole shard: a shard that exists is complete. An empty part becomes an empty
    # shard, or it would be missing forever.
    encode = ENCODERS[task.suffix]
    store.write(task.name, encode(content))
    return len(rows)
