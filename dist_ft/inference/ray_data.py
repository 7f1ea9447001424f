"""Predictions by many workers, with Ray Data: the only module that imports `ray.data`.

The driver streams the tasks through a pool of actors. Each actor loads the model once, and reads
its parts and writes its shards itself, so rows pass through no other machine. What is done is in
storage, never in Ray's memory: Ray replaces a lost worker, and the same command resumes after a
killed driver. How the input is split is not decided here.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any, TypedDict

from dist_ft.core.errors import DistFtError, SentError, WorkerError
from dist_ft.core.logs import quiet_third_parties, redact
from dist_ft.inference import prediction_shards
from dist_ft.inference.model_folder import PredictionOptions
from dist_ft.inference.predict import Predictor
from dist_ft.inference.prediction_shards import ShardTask
from dist_ft.runtime.ray_backend import implicit_uploads, local_cluster
from dist_ft.storage.filesystem import Store


class TaskResults(TypedDict):
    """Columns with one value per task.

    Attributes:
        rows: rows of the shard; 0 after an error.
        error: "" or [type name, message] of the error as JSON. Errors travel as values, for Ray
            would wrap them.
    """

    rows: list[int]
    error: list[str]


class PredictionActor:
    """A worker that loads the model once and writes shard after shard."""

    def __init__(self, model: str, out: str, options: PredictionOptions) -> None:
        """Load the model; an error in it is reported with the first task."""
        quiet_third_parties()
        self._store = Store(out)
        self._error: DistFtError | None = None
        try:
            self._predictor = Predictor(model, options)
        except DistFtError as error:
            self._error = error

    def __call__(self, batch: dict[str, Any]) -> TaskResults:
        """Write the shards of the tasks in column `task`."""
        results = TaskResults(rows=[], error=[])
        for text in batch["task"].tolist():
            num_rows, message = 0, ""

            # The constructor's error is raised here, because only errors of tasks are returned as
            # values: Ray would wrap one that leaves the constructor.
            try:
                if self._error is not None:
                    raise self._error
                task = ShardTask.from_json(text)
                num_rows = prediction_shards.write_shard(self._predictor, self._store, task)
            except DistFtError as error:
                message = json.dumps(SentError.from_error(error))

            results["rows"].append(num_rows)
            results["error"].append(message)

        return results


def predict(
    model: str, out: str, tasks: Sequence[ShardTask], workers: int, options: PredictionOptions
) -> Iterator[int]:
    """Yield the number of rows of each shard as it is written, in any order.

    Raises DistFtError of the first task that fails, WorkerError if Ray gives up.
    """
    with _connected(workers) as ray:
        import ray.data as data

        context = data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False

        num_gpus = 0
        if ray.cluster_resources().get("GPU"):
            num_gpus = 1

        # One task in a block and in a batch: a free actor takes the next shard, and a result
        # arrives as soon as its shard is written.
        rows = [{"task": task.to_json()} for task in tasks]
        results = data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            PredictionActor,
            batch_size=1,
            fn_constructor_args=(model, out, options),
            compute=data.ActorPoolStrategy(size=min(workers, len(tasks))),
            num_cpus=1,
            num_gpus=num_gpus,
        )

        try:
            for row in results.iter_rows():
                if row["error"]:
                    raise SentError(*json.loads(row["error"])).restore(WorkerError)
                yield int(row["rows"])
        except ray.exceptions.RayError as error:
            # The last line names the cause; those before it are the stack of a worker.
            summary = str(error).strip().splitlines()[-1][:200]
            raise WorkerError(
                redact(
                    f"--workers={workers}: Ray gave up ({type(error).__name__}: {summary}). "
                    "Shards that are written remain. The same command resumes."
                )
            ) from error


@contextlib.contextmanager
def _connected(workers: int) -> Iterator[Any]:
    """Connect to the cluster of RAY_ADDRESS, or start one for the time of this context."""
    # Ray reads these when it is imported. The first leaves CUDA_VISIBLE_DEVICES alone in tasks
    # without a GPU, and Ray does not warn about it.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    implicit_uploads.forbid()
    import ray

    # A caller's own connection is used, and left open for it.
    if ray.is_initialized():
        yield ray
        return

    address = os.environ.get("RAY_ADDRESS")
    common: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if address:
            ray.init(address=address, **common)
        else:
            local_cluster.start(ray, num_cpus=workers + 1, **common)
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        raise WorkerError(
            f"RAY_ADDRESS={address}: cannot connect to Ray ({str(error).splitlines()[0][:120]}). "
            "A cluster with this Ray version must run there. Check the address, or unset it to "
            "start an own cluster."
        ) from error

    with local_cluster.shut_down_at_end(ray):
        yield ray
