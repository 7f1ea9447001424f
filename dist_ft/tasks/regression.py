"""regression: a number for a text, or for a pair of texts.

Dimensions: B rows of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from typing_extensions import override

from dist_ft.data.batch import IGNORE_INDEX
from dist_ft.data.encoding import task_rows
from dist_ft.data.encoding.task_rows import Sample
from dist_ft.data.sources.discovery import Row, RowLocation
from dist_ft.metrics import task_scores
from dist_ft.metrics.task_scores import TaskScores
from dist_ft.model.model_task import LossAndOutputs, TaskAbility, TaskInputs, TaskModule
from dist_ft.tasks.base import ModelRunner, Task
from dist_ft.tasks.inference_rows import read_inference_texts
from dist_ft.tasks.results import (
    Description,
    PredictionError,
    PredictionRow,
    RowResult,
    Windows,
)


class Regression(Task):
    """Predict a number for a text.

    A sample's label is the bits of its float32, on the first token. Outputs are values (B,).
    """

    metrics = ("mse", "mae", "pearson", "spearman")
    has_head = True
    allows_augmentation = True
    allows_typos = True
    virtual_token_type = "SEQ_CLS"
    auto_class = "AutoModelForSequenceClassification"
    ability = TaskAbility("score texts")
    problem_type = "regression"
    head_outputs = ("score",)
    describes_errors = True

    @override
    def read(self, row: Row, location: RowLocation) -> Sample:
        columns = self.columns
        value = task_rows.get_value(row, columns.label, "label", location)
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan

        # In float32, as labels are stored: larger numbers would become infinite.
        with np.errstate(over="ignore"):
            label = np.float32(number)
        if not np.isfinite(label) or isinstance(value, bool):
            raise location.error(
                f"{columns.label} is {value!r}. It must be a finite number (float32). Repair or "
                "remove the row."
            )

        bits = int(label.view(np.int32))
        return Sample(*task_rows.read_texts(row, columns, location), bits)

    @override
    def describe_targets(self, targets: np.ndarray) -> str:
        labels = targets[targets != IGNORE_INDEX]
        return f"{labels[:1].view(np.float32)[0]:g}"

    @override
    def compute_loss(self, model: TaskModule, inputs: TaskInputs) -> LossAndOutputs:
        import torch

        from dist_ft.model.losses import loss_sums

        values = model.run_model(inputs.ids, inputs.mask).logits[:, 0]  # (B,)
        labels = inputs.labels[:, 0]
        is_labeled = labels != IGNORE_INDEX
        targets = labels.to(torch.int32).view(torch.float32)
        targets = torch.where(is_labeled, targets, 0.0)
        return LossAndOutputs(loss_sums.squared_error(values, targets, is_labeled), values)

    @override
    def read_output(self, labels: np.ndarray, output: np.ndarray) -> RowResult:
        """Return the target and the predicted number."""
        target = labels[:1].astype(np.int32).view(np.float32)[0]
        return RowResult(float(target), float(output))

    @override
    def compute_scores(self, expected: Sequence[Any], predicted: Sequence[Any]) -> TaskScores:
        return task_scores.regression(np.array(expected), np.array(predicted))

    @override
    def find_error(self, row: PredictionRow) -> PredictionError | None:
        if row.predicted == row.expected:
            return None
        difference = abs(row.predicted - row.expected)
        return PredictionError(row.sample, difference, row.window, row.expected, row.predicted)

    @override
    def describe_error(
        self, error: PredictionError, windows: Windows, tokenizer: Any
    ) -> Description:
        return Description(f"{error.expected:g}", f"{error.predicted:g}", [0])

    @override
    def predict(self, model: ModelRunner, rows: Sequence[Row]) -> Iterable[dict[str, Any]]:
        logits = model.logits(*read_inference_texts(rows, self.columns))
        for value in logits[:, 0].tolist():
            yield {"label": value}
