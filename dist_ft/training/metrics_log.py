"""metrics.jsonl and TensorBoard events in the run's storage, written by rank 0.

Object stores can not append: lines are kept here and the file is written whole at each checkpoint, at the end, and at
most every `FLUSH_S` seconds between, by a thread beside training. On
resume, lines of steps after the checkpoint are dropped: the file always tells
one history.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from dist_ft.checkpoint import discovery
from dist_ft.core.errors import StorageError
from dist_ft.storage.filesystem import Store
from dist_ft.training.trackers import Trackers

log = logging.getLogger("dist_ft.metrics")
FILE = "metrics.jsonl"
FLUSH_S = 30.0
BETWEEN = 20
"""Flushes take at most so small a part of the time, but for those at saves."""


class MetricsLog:
    """Rank 0's record of the run at `store`, going on after `lines` (of `read_metrics`)."""

    def __init__(
        self,
        store: Store,
        lines: list[dict[str, Any]],
        attempt: int,
        tensorboard: bool,
        trackers: Trackers | None = None,
    ) -> None:
        self._store = store
        self._attempt = attempt
        self._trackers = trackers or Trackers([])
        self._lines = [(line["step"], _encoded(line)) for line in lines]
        self._next_s = time.monotonic() + FLUSH_S
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="metrics")
        self._flushes: Future[None] | None = None
        self._tensorboard = tensorboard
        self._target = f"tensorboard/attempt-{attempt:04d}"
        self._folder: str | None = None
        self._writer: Any = None

    def add(self, step: int, kind: str, values: dict[str, float]) -> None:
        """Note the values of one step ("train" or "evaluation"); in the file, what is no number is null (JSON)."""
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._lines.append((step, _encoded({"step": step, "kind": kind, **finite})))
        self._trackers.add(step, kind, values)
        if self._tensorboard:
            if self._writer is None:
                from torch.utils.tensorboard import SummaryWriter

                self._folder = tempfile.mkdtemp(prefix="dist_ft-tensorboard-")
                self._writer = SummaryWriter(self._folder)
            for name, value in values.items():
                self._writer.add_scalar(f"{kind}/{name}", value, step)
        if time.monotonic() > self._next_s:
            self.flush()

    def rewind(self, step: int) -> None:
        """Forget the lines of steps after `step`."""
        self._lines = [line for line in self._lines if line[0] <= step]

    def flush(self) -> Future[None]:
        """Begin to bring the run's storage up to date; the future is done when all lines up to now are there.

        Failing storage is logged, training goes on. What a newer attempt has written since it took over the run is left
        alone.
        """
        self._next_s = time.monotonic() + FLUSH_S
        waiting = self._flushes
        if waiting is None or waiting.running() or waiting.done():
            waiting = self._flushes = self._thread.submit(self._write)
        return waiting

    def _write(self) -> None:
        begun = time.monotonic()
        try:
            if discovery.latest_attempt(self._store) > self._attempt:
                return
            self._store.write(FILE, b"".join(text for _, text in self._lines))
            if self._writer is not None and self._folder is not None:
                self._writer.flush()
                for name in os.listdir(self._folder):
                    with open(os.path.join(self._folder, name), "rb") as file:
                        self._store.write(f"{self._target}/{name}", file.read())
        except StorageError as error:
            log.warning("metrics were not written: %s", error)
        now = time.monotonic()
        self._next_s = max(
            self._next_s, now + BETWEEN * (now - begun)
        )  # the files grow with the run

    def close(self) -> None:
        """Write what is left and remove temporary files."""
        self.flush().result()
        self._thread.shutdown()
        self._trackers.close()
        if self._writer is not None:
            self._writer.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


def _encoded(line: dict[str, Any]) -> bytes:
    return json.dumps(line, allow_nan=False).encode() + b"\n"


def read_metrics(store: Store, step: int | None = None) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics.jsonl, those of steps after `step` left out; an absent file has none.

    Raises StorageError for a file that is not what this module writes: it would be overwritten.
    """
    if step == 0 or not store.exists(FILE):
        return []
    try:
        lines = [json.loads(line) for line in store.read(FILE).decode("utf-8").splitlines() if line]
        return [line for line in lines if step is None or line["step"] <= step]
    except (ValueError, KeyError, TypeError) as error:
        raise StorageError(
            f"{store.redacted_url(FILE)}: not a file of metrics ({error}); lines of JSON with a step are "
            "allowed; move it away"
        ) from error
