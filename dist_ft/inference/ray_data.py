"""Many workers ask a model, by Ray Data: the only module that imports `ray.data`.

The driver streams the parts of the input through a pool of actors; each loads the model once, and reads and writes its
parts itself, so that rows pass through no other machine. What is done is in storage, never in Ray's memory: a worker
that is lost is replaced by Ray, a driver that is killed is followed by the same command. Decides nothing about parts.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any

from dist_ft.core import errors
from dist_ft.core.errors import DistFtError, WorkerError
from dist_ft.core.logs import quiet_third_parties, redact
from dist_ft.inference import prediction_shards
from dist_ft.inference.predict import Predictor
from dist_ft.storage.filesystem import Store

OBJECT_STORE_BYTES = 128 * 2**20


class Asked:
    """A worker: the model, loaded once, that makes shard after shard."""

    def __init__(
        self, model: str, out: str, batch: int, max_new_tokens: int, strategy: str
    ) -> None:
        """Load the model; what is wrong with it is told with the first part."""
        quiet_third_parties()
        self._store = Store(out)
        self._error: DistFtError | None = None
        try:
            self._predictor = Predictor(model, batch, max_new_tokens, strategy)
        except DistFtError as error:
            self._error = error

    def __call__(self, rows: dict[str, Any]) -> dict[str, Any]:
        """Make the shards of the parts in column `task`; return how many rows each has, or what is wrong."""
        counts, wrong = [], []
        for task in rows["task"].tolist():
            try:
                if self._error is not None:
                    raise self._error
                counts.append(
                    prediction_shards.make(self._predictor, self._store, json.loads(task))
                )
                wrong.append("")
            except DistFtError as error:
                counts.append(0)
                wrong.append(json.dumps([type(error).__name__, str(error)]))
        return {"rows": counts, "wrong": wrong}


def predict(
    model: str,
    out: str,
    tasks: Sequence[prediction_shards.Task],
    workers: int,
    batch: int,
    max_new_tokens: int,
    strategy: str = "greedy",
) -> Iterator[int]:
    """Yield the rows of each part as it is done, in any order.

    Raises DistFtError of the first part that can not be made, WorkerError if Ray gives up.
    """
    with _connected(workers) as ray:
        import ray.data as data

        context = data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        gpus = 1 if ray.cluster_resources().get("GPU") else 0
        parts = data.from_items(
            [{"task": json.dumps(task)} for task in tasks], override_num_blocks=len(tasks)
        )
        made = parts.map_batches(
            Asked,
            batch_size=1,
            fn_constructor_args=(model, out, batch, max_new_tokens, strategy),
            compute=data.ActorPoolStrategy(size=min(workers, len(tasks))),
            num_cpus=1,
            num_gpus=gpus,
        )
        try:
            for row in made.iter_rows():
                if row["wrong"]:
                    kind, text = json.loads(row["wrong"])
                    raise _named(kind, text)
                yield int(row["rows"])
        except ray.exceptions.RayError as error:
            first = str(error).strip().splitlines()[-1][:200]
            raise WorkerError(
                redact(
                    f"--workers={workers}: Ray gave up ({type(error).__name__}: {first}); what is "
                    "written is kept; the same command goes on from there"
                )
            ) from error


def _named(kind: str, text: str) -> DistFtError:
    """Return the error a worker told of, as its own type where that takes a text."""
    found = getattr(errors, kind, WorkerError)
    try:
        return found(text)
    except TypeError:
        return WorkerError(text)


@contextlib.contextmanager
def _connected(workers: int) -> Iterator[Any]:
    """Connect to the cluster the environment names, or start one with a place for each worker that ends with this."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    import ray

    if ray.is_initialized():
        yield ray
        return
    address = os.environ.get("RAY_ADDRESS")
    common: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if address:
            ray.init(address=address, **common)
        else:
            ray.init(
                address="local",
                include_dashboard=False,
                num_cpus=workers + 1,
                object_store_memory=OBJECT_STORE_BYTES,
                **common,
            )
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        raise WorkerError(
            f"RAY_ADDRESS={address}: can not connect to Ray ({str(error).splitlines()[0][:120]}); check "
            "that a cluster runs there with this Ray version, or unset it to start an own one"
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()
