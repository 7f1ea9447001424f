"""Predictions of many rows as a folder of shards: cut by the input alone, so any number of workers writes the same.

Guarantees: shard i holds the rows of part i of the input, in their order; it is written whole or not at all, and one
that is there is not made again, so a start that was killed is gone on with. A folder of another model, other rows or
another format is refused. One process makes them here; `ray_data` has many do it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from dist_ft.data import readers
from dist_ft.data.blocks import Part
from dist_ft.data.source import Row, Shard
from dist_ft.data.write import as_jsonl, as_parquet
from dist_ft.errors import DataError
from dist_ft.logs import redact
from dist_ft.runtime.predicting import Predictor, version_of
from dist_ft.storage import Store, is_local, local_path

PART_BYTES = 2 * 2**20
"""Of input text, about, in a part."""
MOST_ROWS = 2**24
"""Of a part, and more: what is drawn for a row follows from its part and its place there."""
ABOUT = "_predictions.json"
"""File of the folder that says of which model and rows its shards are; readers of data pass over such names."""
ENCODERS = {"jsonl": as_jsonl, "parquet": as_parquet}

Task = dict[str, Any]
"""A part of the input: its number, shard, place there, and the name of the shard it becomes."""


def cut(shards: Sequence[Shard], suffix: str, part_bytes: int = PART_BYTES) -> list[Task]:
    """Return the parts of the input in order; each is JSON values, for it may travel to another machine."""
    parts = [
        part
        for number, shard in enumerate(shards)
        for part in readers.survey(shard, number, part_bytes)
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
    for _, found in readers.read(shard, [Part(**task["part"])]):
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


def predict_folder(
    model: str,
    shards: Sequence[Shard],
    out: str,
    *,
    suffix: str = "jsonl",
    workers: int = 0,
    batch: int = 32,
    max_new_tokens: int = 128,
    strategy: str = "greedy",
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> tuple[int, int]:
    """Write what the model says of every row into the folder `out`; return (shards there are, rows written now).

    Args:
        model: folder, URL or hub name.
        shards: of the input.
        out: folder or fsspec URL.
        suffix: jsonl or parquet.
        workers: processes on Ray, each with the model; 0: this one, without Ray.
        batch: rows at once.
        max_new_tokens: longest text to make, in tokens.
        strategy: how texts are made; see `api.predict`.
        progress: called with (shards done, shards there are).

    Raises:
        DataError, ModelError, StorageError: as one process does; shards that are done stay.
    """
    store, tasks = Store(out), cut(shards, suffix)
    todo = missing(store, tasks, version_of(model, max_new_tokens, strategy))
    counts = _here(model, store, todo, batch, max_new_tokens, strategy)
    if workers and todo:
        from dist_ft.runtime import ray_data

        counts = ray_data.predict(
            _absolute(model), store.url, todo, workers, batch, max_new_tokens, strategy
        )
    rows = 0
    for done, count in enumerate(counts, len(tasks) - len(todo) + 1):
        rows += count
        progress(done, len(tasks))
    if set(missing(store, tasks, version_of(model, max_new_tokens, strategy))):
        raise DataError(
            redact(
                f"--out={out}: some shards are not there after all were made; does another process "
                "remove them? the same command makes them"
            )
        )
    return len(tasks), rows


def _absolute(model: str) -> str:
    """Return the path of a local folder as workers, which may run elsewhere, can use it; other names as they are."""
    folder = os.path.abspath(local_path(model)) if is_local(model) else ""
    return folder if os.path.isdir(folder) else model


def _here(
    model: str, store: Store, todo: Sequence[Task], batch: int, max_new_tokens: int, strategy: str
) -> Iterator[int]:
    """Yield the rows of each part, made in this process."""
    predictor = Predictor(model, batch, max_new_tokens, strategy) if todo else None
    for task in todo:
        assert predictor is not None
        yield make(predictor, store, task)
