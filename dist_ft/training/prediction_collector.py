"""Collects the predictions of all workers for each sample, and computes metrics from them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from dist_ft.config.sections.task import TaskSection
from dist_ft.core.world import Collectives
from dist_ft.data.batch import Batch
from dist_ft.metrics.task_scores import METRICS_BY_TASK, TaskScores
from dist_ft.training import error_examples
from dist_ft.training.error_examples import ErrorExample, Window, WindowKey
from dist_ft.training.predictions import ROW_READERS, PredictionRow, best_answers


class Predictions(NamedTuple):
    """Expected and predicted values, one of each for every sample, in the order of samples."""

    expected: list[Any]
    predicted: list[Any]


class PredictionCollector:
    """Collects predictions batch by batch, then scores them."""

    def __init__(self, task: TaskSection) -> None:
        """Start without a prediction; `task` says how the model's output is read."""
        self._task = task
        self._rows: list[PredictionRow] = []  # of this worker
        self._windows: dict[WindowKey, Window] = {}  # of this worker, where examples need them
        self._all_rows: list[PredictionRow] = []  # of all workers, once gathered

    def add(self, batch: Batch, outputs: np.ndarray) -> None:
        """Add the model's `outputs` for `batch`, one for each of its rows."""
        read = ROW_READERS[self._task.name]
        for row, (sample, start, size, _) in enumerate(batch.segments.tolist()):
            result = read(batch.target_ids[row, :size], outputs[row])
            self._rows.append(PredictionRow(sample, start, *result))
            if self._task.name in error_examples.DESCRIBERS:
                self._windows[sample, start] = Window(
                    batch.input_ids[row, :size].astype(np.int32),
                    batch.target_ids[row, :size].astype(np.int32),
                )

    def compute_scores(self, collectives: Collectives) -> TaskScores:
        """Return the metrics over the rows of all workers, on all workers; a collective call."""
        expected, predicted = self.gather_predictions(collectives)
        if not expected:
            return TaskScores({})

        compute = METRICS_BY_TASK[self._task.name]
        if self._task.name == "token_classification":
            return compute(self._task, expected, [tags for tags, _ in predicted])
        return compute(self._task, np.array(expected), np.array(predicted))

    def gather_predictions(self, collectives: Collectives) -> Predictions:
        """Return the predictions of all workers, ordered by sample; a collective call."""
        rows = [row for part in collectives.all_gather(self._rows) for row in part]
        rows.sort(key=lambda row: (row.sample, row.window))
        self._all_rows = rows
        if rows and self._task.name == "question_answering":
            answers = best_answers(rows)
            return Predictions(
                [answer.expected for answer in answers], [answer.predicted for answer in answers]
            )

        return Predictions([row.expected for row in rows], [row.predicted for row in rows])

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
