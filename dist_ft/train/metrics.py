"""metrics.jsonl and TensorBoard events in the run's storage, written by rank 0.

Object stores can not append: lines are kept here and the file is written whole at each checkpoint, at the end, and at
most every `FLUSH_S` seconds between. On resume, lines of steps after the checkpoint are dropped: the file always tells
one history.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
import time
from typing import Any

from dist_ft.errors import StorageError
from dist_ft.storage import Store

log = logging.getLogger("dist_ft.metrics")
FILE = "metrics.jsonl"
FLUSH_S = 30.0


class MetricsLog:
    """Rank 0's record of the run at `store`, going on after `step`."""

    def __init__(self, store: Store, step: int, attempt: int, tensorboard: bool) -> None:
        self._store = store
        self._lines = [line for line in read_metrics(store) if line["step"] <= step] if step else []
        self._flushed = time.monotonic()
        self._folder = tempfile.mkdtemp(prefix="dist_ft-tensorboard-") if tensorboard else None
        self._target = f"tensorboard/attempt-{attempt:04d}"
        self._writer: Any = None

    def add(self, step: int, kind: str, values: dict[str, float]) -> None:
        """Note the values of one step ("train" or "evaluation")."""
        self._lines.append({"step": step, "kind": kind, **values})
        if self._folder is not None:
            if self._writer is None:
                from torch.utils.tensorboard import SummaryWriter

                self._writer = SummaryWriter(self._folder)
            for name, value in values.items():
                self._writer.add_scalar(f"{kind}/{name}", value, step)
        if time.monotonic() - self._flushed > FLUSH_S:
            self.flush()

    def flush(self) -> None:
        """Bring the run's storage up to date; failing storage is logged, training goes on."""
        self._flushed = time.monotonic()
        try:
            text = "".join(json.dumps(line) + "\n" for line in self._lines)
            self._store.write(FILE, text.encode())
            if self._writer is not None and self._folder is not None:
                self._writer.flush()
                for name in os.listdir(self._folder):
                    with open(os.path.join(self._folder, name), "rb") as file:
                        self._store.write(f"{self._target}/{name}", file.read())
        except StorageError as error:
            log.warning("metrics were not written: %s", error)

    def close(self) -> None:
        """Write what is left and remove temporary files."""
        self.flush()
        if self._writer is not None:
            self._writer.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


def read_metrics(store: Store) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics.jsonl; an absent file has none."""
    if not store.exists(FILE):
        return []
    return [json.loads(line) for line in store.read(FILE).decode("utf-8").splitlines() if line]
