"""sequence_classification: one label for a text, or for a pair of texts.

Dimensions: B rows of a batch, K labels, N samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from typing_extensions import override

from dist_ft.data.encoding import task_rows
from dist_ft.data.encoding.task_rows import Sample
from dist_ft.data.sources.discovery import Row, RowLocation
from dist_ft.metrics import task_scores
from dist_ft.metrics.task_scores import TaskScores, softmax
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


class SequenceClassification(Task):
    """Choose one label for a text.

    A sample's label is its number, on the first token. Outputs are logits (B, K).
    """

    fields = ("labels", "new_head", "grow_head", "class_weights", "focal_gamma")
    metrics = ("accuracy", "f1_macro", "f1_weighted", "mcc", "calibration_error")
    has_labels = True
    has_label_per_row = True
    has_head = True
    allows_augmentation = True
    allows_typos = True
    has_probabilities = True
    prompting_methods = ("likelihood", "prototypes")
    virtual_token_type = "SEQ_CLS"
    auto_class = "AutoModelForSequenceClassification"
    ability = TaskAbility("classify texts")
    problem_type = "single_label_classification"
    describes_errors = True

    @override
    def read(self, row: Row, location: RowLocation) -> Sample:
        columns = self.columns
        value = task_rows.get_value(row, columns.label, "label", location)
        texts = task_rows.read_texts(row, columns, location)
        label = task_rows.get_label_id(value, self.label_ids, columns.label, location)
        return Sample(*texts, label)

    @override
    def compute_loss(self, model: TaskModule, inputs: TaskInputs) -> LossAndOutputs:
        logits = model.run_model(inputs.ids, inputs.mask).logits  # (B, K)
        loss = model.weighted_cross_entropy(logits, inputs.labels[:, 0])
        return LossAndOutputs(loss, logits)

    @override
    def read_output(self, labels: np.ndarray, output: np.ndarray) -> RowResult:
        """Return the label's number and the logits (K,)."""
        return RowResult(int(labels[0]), output)

    @override
    def compute_scores(self, expected: Sequence[Any], predicted: Sequence[Any]) -> TaskScores:
        return task_scores.sequence_classification(
            self.labels, np.array(expected), np.array(predicted)
        )

    @override
    def find_error(self, row: PredictionRow) -> PredictionError | None:
        probabilities = softmax(row.predicted.astype(float))
        label = int(probabilities.argmax())
        if label == row.expected:
            return None
        confidence = float(probabilities[label])
        return PredictionError(row.sample, confidence, row.window, row.expected, label)

    @override
    def describe_error(
        self, error: PredictionError, windows: Windows, tokenizer: Any
    ) -> Description:
        expected, predicted = self.labels[error.expected], self.labels[error.predicted]
        return Description(expected, predicted, [error.predicted])

    @override
    def decide(self, predicted: Any) -> Any:
        """Return the number of the label."""
        return np.asarray(predicted).argmax()

    @override
    def predict(self, model: ModelRunner, rows: Sequence[Row]) -> Iterable[dict[str, Any]]:
        scores = model.label_scores(*read_inference_texts(rows, self.columns))
        for row in softmax(scores):
            label = self.labels[int(row.argmax())]
            yield {"label": label, "score": round(float(row.max()), 6)}
