"""Predictions of a whole data set into a folder of shards, in this process or on Ray workers."""

from __future__ import annotations

from typing import NamedTuple
import os
from collections.abc import Callable, Iterator, Sequence

from dist_ft.core.errors import DataError
from dist_ft.core.logs import redact
from dist_ft.data.sources.discovery import Shard
from dist_ft.inference.predict import Predictor, version_of
from dist_ft.inference.prediction_shards import Task, cut, make, missing
from dist_ft.storage.filesystem import Store, is_local, local_path


class WrittenPredictions(NamedTuple):
    """How many files hold the predictions, and how many rows were written by this call."""

    files: int
    rows: int


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
) -> WrittenPredictions:
    """Write a prediction for every row into the folder `out`; rows are those written now.

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
        from dist_ft.inference import ray_data

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
    return WrittenPredictions(len(tasks), rows)


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
