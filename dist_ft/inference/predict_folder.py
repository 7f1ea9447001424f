"""Predictions of a whole data set as a folder of shards, in this process or on Ray workers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from dist_ft.core.errors import DataError
from dist_ft.core.logs import redact
from dist_ft.data.sources.discovery import Shard
from dist_ft.inference.model_folder import DEFAULT_OPTIONS, PredictionOptions, model_version
from dist_ft.inference.predict import Predictor
from dist_ft.inference.prediction_shards import ShardTask, missing_tasks, split_input, write_shard
from dist_ft.storage.filesystem import Store, is_local, local_path


class WrittenPredictions(NamedTuple):
    """What a prediction wrote.

    Attributes:
        files: files of the output, those from earlier calls included.
        rows: rows predicted by this call.
    """

    files: int
    rows: int


def predict_folder(
    model: str,
    shards: Sequence[Shard],
    out: str,
    options: PredictionOptions = DEFAULT_OPTIONS,
    *,
    suffix: str = "jsonl",
    workers: int = 0,
    on_progress: Callable[[int, int], None] = lambda num_done, num_shards: None,
) -> WrittenPredictions:
    """Write each row with its prediction into the folder `out`.

    Args:
        model: folder, URL or hub name.
        shards: shards of the input.
        out: folder or fsspec URL.
        options: how the model is applied.
        suffix: jsonl or parquet.
        workers: processes on Ray, each with the model; 0: this process, without Ray.
        on_progress: called with (shards written, shards in all).

    Raises:
        DataError, ModelError, StorageError: shards that are written remain.
    """
    store, tasks = Store(out), split_input(shards, suffix)
    todo = missing_tasks(store, tasks, model_version(model, options))

    # Both yield as shards are written, so that progress is shown before the last one is.
    if workers and todo:
        from dist_ft.inference import ray_data

        row_counts = ray_data.predict(_absolute(model), store.url, todo, workers, options)
    else:
        row_counts = _predict_here(model, store, todo, options)

    # Shards of earlier calls count as progress, their rows do not.
    num_done = len(tasks) - len(todo)
    num_rows = 0
    for count in row_counts:
        num_done += 1
        num_rows += count
        on_progress(num_done, len(tasks))

    # Success is what storage holds, not what workers reported. The model is identified again, as
    # its files may have changed meanwhile.
    if missing_tasks(store, tasks, model_version(model, options)):
        raise DataError(
            redact(
                f"--out={out}: some shards are missing after all were written. No other process "
                "may remove them. The same command writes them again."
            )
        )

    return WrittenPredictions(len(tasks), num_rows)


def _absolute(model: str) -> str:
    """Return the absolute path of a local folder, for workers with another working directory.

    Other names are returned unchanged.
    """
    if not is_local(model):
        return model

    # A hub name, such as org/name, looks like a local path too: only a folder that exists is one.
    folder = os.path.abspath(local_path(model))
    if os.path.isdir(folder):
        return folder
    return model


def _predict_here(
    model: str, store: Store, tasks: Sequence[ShardTask], options: PredictionOptions
) -> Iterator[int]:
    """Write the shards in this process; yield the number of rows of each."""
    # Nothing is left to do, so the model, which takes long to load, is not needed.
    if not tasks:
        return

    predictor = Predictor(model, options)
    for task in tasks:
        yield write_shard(predictor, store, task)
