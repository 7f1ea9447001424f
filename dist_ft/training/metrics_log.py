"""metrics.jsonl and TensorBoard events in the run's storage, written by rank 0.

Object stores cannot append: lines are held in memory and the file is written as a whole at each
checkpoint, at the end, and at most every `FLUSH_S` seconds in between, by a thread next to
training. On resume, lines of steps after the checkpoint are dropped, so that the file always holds
one history.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from dist_ft.checkpoint import attempts
from dist_ft.core import scratch
from dist_ft.core.errors import StorageError
from dist_ft.core.json_documents import decode_json
from dist_ft.storage.documents import MAX_LARGE_BYTES
from dist_ft.storage.filesystem import Store
from dist_ft.training.callbacks import Callback
from dist_ft.training.trackers import Trackers

log = logging.getLogger("dist_ft.metrics")
MAX_STEP = 2**62
FILE = "metrics.jsonl"
FLUSH_S = 30.0
FLUSH_PAUSE = 20
"""After a flush, the next one waits this many times as long as it took, except at saves."""
OLD_PACE_NAMES = {"stood_share": "stalled_share"}
"""Names of version 0.1.0 in lines of the kind "pace", to those of today."""


class MetricsLog:
    """Rank 0's metrics of the run at `store`, continued after `lines` (of `read_metrics`)."""

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
        self._lines = [(line["step"], _encode(line)) for line in lines]
        self._next_flush_s = time.monotonic() + FLUSH_S
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="metrics")
        self._last_flush: Future[None] | None = None

        # Each attempt has its own folder of events: TensorBoard shows them as one curve each.
        self._tensorboard = tensorboard
        self._target = f"{attempts.TENSORBOARD}/attempt-{attempt:04d}"
        self._folder: scratch.Scratch | None = None
        self._writer: Any = None

    def add(self, step: int, kind: str, values: dict[str, float]) -> None:
        """Add the values of one step; `kind`: train, evaluation or pace.

        NaN and infinity become null in the file (JSON).
        """
        # JSON has no NaN: a reader other than Python would refuse the whole line.
        line: dict[str, Any] = {"step": step, "kind": kind}
        for name, value in values.items():
            line[name] = value
            if not math.isfinite(value):
                line[name] = None

        # Encoded once, as the file is written as a whole each time.
        self._lines.append((step, _encode(line)))
        self._trackers.add(step, kind, values)
        if self._tensorboard:
            self._add_events(step, kind, values)

        if time.monotonic() > self._next_flush_s:
            self.flush()

    def _add_events(self, step: int, kind: str, values: dict[str, float]) -> None:
        writer = self._summary_writer()
        try:
            for name, value in values.items():
                writer.add_scalar(f"{kind}/{name}", value, step)
        except OSError as error:
            # TensorBoard's thread opens the file at each write, and its error is raised here.
            self._give_up_tensorboard(error)

    def _give_up_tensorboard(self, error: OSError) -> None:
        """Write no more events: the local files are gone, or the local disk fails."""
        # A cleaner of temporary files may remove them while a run trains for days.
        self._tensorboard = False
        log.warning("TensorBoard gets no more events (%s); training continues", error)

    def _summary_writer(self) -> Any:
        # TensorBoard writes to local files only; `_copy_events` copies them to the run's storage.
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._folder = scratch.create("tensorboard")
            self._writer = SummaryWriter(str(self._folder.path))

        return self._writer

    def rewind(self, step: int) -> None:
        """Drop the lines of steps after `step`."""
        # A new list, because the thread may be reading the old one.
        self._lines = [line for line in self._lines if line[0] <= step]

    def flush(self) -> Future[None]:
        """Start to write all lines up to now; the future is done when they are in storage.

        Storage errors are logged and training continues. What a newer attempt has written since it
        took over the run is left alone.
        """
        self._next_flush_s = time.monotonic() + FLUSH_S

        # A flush that has not started yet will write these lines too. One that is running may have
        # read its lines already.
        flush = self._last_flush
        if flush is None or flush.running() or flush.done():
            flush = self._thread.submit(self._write)
            self._last_flush = flush

        return flush

    def _write(self) -> None:
        start_s = time.monotonic()
        try:
            # A worker that a newer attempt has replaced may still run for a while.
            if attempts.latest_record(self._store) > self._attempt:
                return

            self._store.write(FILE, b"".join(text for _, text in self._lines))
            self._copy_events()
        except StorageError as error:
            log.warning("metrics were not written: %s", error)

        # The files grow with the run, and so must the pauses between two writes of them.
        now_s = time.monotonic()
        pause_s = FLUSH_PAUSE * (now_s - start_s)
        self._next_flush_s = max(self._next_flush_s, now_s + pause_s)

    def _copy_events(self) -> None:
        """Copy the files of TensorBoard to the run's storage."""
        if not self._tensorboard or self._writer is None or self._folder is None:
            return

        try:
            self._writer.flush()
            for name in os.listdir(self._folder.path):
                with open(self._folder.path / name, "rb") as file:
                    self._store.write(f"{self._target}/{name}", file.read())
        except OSError as error:
            self._give_up_tensorboard(error)

    def close(self) -> None:
        """Write all lines and remove temporary files."""
        # The flush first: trackers may wait for the network when they are closed.
        self.flush().result()
        self._thread.shutdown()
        self._trackers.close()
        if self._writer is not None:
            # Its files may be gone; all events that could be copied are in storage.
            with contextlib.suppress(OSError):
                self._writer.close()
        if self._folder is not None:
            self._folder.remove()


def log_metrics(
    metrics_log: MetricsLog | None,
    callbacks: Callback,
    step: int,
    kind: str,
    values: dict[str, float],
) -> None:
    """Add a line of metrics and call the callbacks; does nothing on ranks without a log."""
    if metrics_log is not None:
        metrics_log.add(step, kind, values)
        callbacks.on_metrics(step, kind, values)


def _encode(line: dict[str, Any]) -> bytes:
    return json.dumps(line, allow_nan=False).encode() + b"\n"


def read_metrics(store: Store, step: int | None = None) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics.jsonl up to `step`; empty if there is no file.

    Raises:
        StorageError: the file is not a metrics file; writing metrics would overwrite it.
    """
    if step == 0 or not store.exists(FILE):
        return []

    try:
        content = store.read_at_most(FILE, MAX_LARGE_BYTES)
        lines = [_check_line(decode_json(line)) for line in content.split(b"\n") if line]
        return [_with_new_names(line) for line in lines if step is None or line["step"] <= step]
    except ValueError as error:
        raise StorageError(
            f"{store.redacted_url(FILE)}: not a file of metrics ({error}). Allowed: lines of JSON "
            "with a step. Move the file away."
        ) from error


def _check_line(line: Any) -> dict[str, Any]:
    """Return a line of metrics; raises ValueError for one without a step."""
    if not isinstance(line, dict):
        raise ValueError(f"a line is a {type(line).__name__}")
    step = line.get("step")
    if not isinstance(step, int) or not 0 <= step < MAX_STEP:
        raise ValueError("a line has no step")
    return line


def _with_new_names(line: dict[str, Any]) -> dict[str, Any]:
    """Return a line with the metric names of today."""
    if line.get("kind") != "pace":
        return line

    # Names end with the worker they are of: metric/node/rank.
    renamed = {}
    for name, value in line.items():
        metric, slash, worker = name.partition("/")
        renamed[OLD_PACE_NAMES.get(metric, metric) + slash + worker] = value

    return renamed
