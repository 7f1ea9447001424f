"""Collects the predictions of all workers for each sample, and computes metrics from them."""

from __future__ import annotations

from typing import Any

import numpy as np

from dist_ft.config.sections.task import TaskSection
from dist_ft.core.world import Collectives
from dist_ft.data.batch import Batch
from dist_ft.metrics.task_scores import TaskScores
from dist_ft.tasks.base import make_task
from dist_ft.tasks.results import PredictionRow, Predictions, Window, WindowKey
from dist_ft.training import error_examples
from dist_ft.training.error_examples import ErrorExample


class PredictionCollector:
    """Collects predictions batch by batch, then scores them."""

    def __init__(self, task: TaskSection) -> None:
        """Start without a prediction; `task` says how the model's output is read."""
        self._task = make_task(task)
        self._rows: list[PredictionRow] = []  # of this worker
        self._windows: dict[WindowKey, Window] = {}  # of this worker, where examples need them
        self._all_rows: list[PredictionRow] = []  # of all workers, once gathered

    def add(self, batch: Batch, outputs: np.ndarray) -> None:
        """Add the model's `outputs` for `batch`, one for each of its rows."""
        for row, (sample, start, size, _) in enumerate(batch.segments.tolist()):
            result = self._task.read_output(batch.target_ids[row, :size], outputs[row])
            self._rows.append(PredictionRow(sample, start, *result))
            if self._task.describes_errors:
                self._windows[sample, start] = Window(
                    batch.input_ids[row, :size].astype(np.int32),
                    batch.target_ids[row, :size].astype(np.int32),
                )

    def compute_scores(self, collectives: Collectives) -> TaskScores:
        """Return the metrics over the rows of all workers, on all workers; a collective call."""
        expected, predicted = self.gather_predictions(collectives)
        if not expected:
            return TaskScores({})

        return self._task.compute_scores(expected, predicted)

    def gather_predictions(self, collectives: Collectives) -> Predictions:
        """Return the predictions of all workers, ordered by sample; a collective call."""
        rows = [row for part in collectives.all_gather(self._rows) for row in part]
        rows.sort(key=lambda row: (row.sample, row.window))
        self._all_rows = rows
        return self._task.combine_windows(rows)

    def collect_error_examples(
        self, collectives: Collectives, tokenizer: Any
    ) -> list[ErrorExample]:
        """Return the most confident errors, on all workers; a collective call.

        Call `compute_scores` or `gather_predictions` before.
        """
        errors = error_examples.select_errors(self._task, self._all_rows)
        own_windows = {}
        for error in errors:
            for key in error.window_keys:
                if key in self._windows:
                    own_windows[key] = self._windows[key]

        windows: dict[WindowKey, Window] = {}
        for part in collectives.all_gather(own_windows):
            windows |= part
        return error_examples.describe_errors(self._task, errors, windows, tokenizer)
