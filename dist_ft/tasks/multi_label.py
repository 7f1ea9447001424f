"""multi_label: any number of labels for a text.

A label set is stored as bits, `LABELS_PER_POSITION` of them in the int32 label of a token.

Dimensions: B rows of a batch, K labels, W int32 words that hold the bits of K labels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from typing_extensions import override

from dist_ft.data.batch import IGNORE_INDEX
from dist_ft.data.encoding import task_rows
from dist_ft.data.encoding.data_task import LabeledTokens, RowEncoder
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

LABELS_PER_POSITION = 30
"""How many labels share one int32, one bit each."""


class MultiLabel(Task):
    """Choose any number of labels for a text. Outputs are logits (B, K), above 0 for a label."""

    fields = ("labels", "new_head", "grow_head", "focal_gamma")
    metrics = ("accuracy", "f1_micro", "f1_macro")
    has_labels = True
    has_head = True
    allows_augmentation = True
    allows_typos = True
    virtual_token_type = "SEQ_CLS"
    auto_class = "AutoModelForSequenceClassification"
    ability = TaskAbility("classify texts")
    problem_type = "multi_label_classification"
    describes_errors = True

    @override
    def read(self, row: Row, location: RowLocation) -> Sample:
        columns = self.columns
        value = task_rows.get_value(row, columns.label, "label", location)
        names = task_rows.require_list(value, columns.label, "labels", location)
        texts = task_rows.read_texts(row, columns, location)
        labels = [
            task_rows.get_label_id(name, self.label_ids, columns.label, location) for name in names
        ]
        return Sample(*texts, labels)

    @override
    def read_label_names(self, row: Row, location: RowLocation) -> list[str]:
        column = self.columns.label
        value = task_rows.get_value(row, column, "label", location)
        names = task_rows.require_list(value, column, "labels", location)
        return [str(name) for name in names if name is not None]

    @override
    def label_tokens(self, encoding: Any, sample: Sample, encoder: RowEncoder) -> LabeledTokens:
        """Put the set of labels as bits on the first tokens."""
        words = np.zeros(self.num_label_tokens(), np.int32)
        for label in sample.label:
            word, bit = divmod(label, LABELS_PER_POSITION)
            words[word] |= np.int32(1 << bit)

        labels = np.full(len(encoding.ids), IGNORE_INDEX, np.int32)
        labels[: len(words)] = words[: len(labels)]
        return LabeledTokens(encoding.ids, labels)

    @override
    def num_label_tokens(self) -> int:
        return -(-len(self.labels) // LABELS_PER_POSITION)

    @override
    def describe_targets(self, targets: np.ndarray) -> str:
        names = np.array(self.labels, dtype=object)
        words = targets[targets != IGNORE_INDEX]  # (W,)
        word_of_label, bit_of_label = np.divmod(np.arange(len(names)), LABELS_PER_POSITION)
        is_set = (words[word_of_label] >> bit_of_label & 1).astype(bool)  # (K,)
        return ", ".join(names[is_set]) or "no label"

    @override
    def compute_loss(self, model: TaskModule, inputs: TaskInputs) -> LossAndOutputs:
        import torch

        from dist_ft.model.losses import loss_sums

        logits = model.run_model(inputs.ids, inputs.mask).logits  # (B, K)
        num_words = self.num_label_tokens()
        words = inputs.labels[:, :num_words].clamp(min=0)  # (B, W)
        label_numbers = torch.arange(logits.shape[1], device=logits.device)
        words_of_labels = words[:, label_numbers // LABELS_PER_POSITION]  # (B, K)
        bits = words_of_labels >> (label_numbers % LABELS_PER_POSITION) & 1

        # A row counts once for each position that is labeled: the trainer divides by positions.
        row_weights = (inputs.labels[:, 0] != IGNORE_INDEX) * num_words
        focal_gamma = self.section.focal_gamma
        loss = loss_sums.binary_cross_entropy(logits, bits, row_weights, focal_gamma)
        return LossAndOutputs(loss, logits)

    @override
    def read_output(self, labels: np.ndarray, output: np.ndarray) -> RowResult:
        """Return 0 or 1 for each label (K,), and the logits (K,)."""
        numbers = np.arange(len(output))
        words = labels[numbers // LABELS_PER_POSITION]
        return RowResult(words >> (numbers % LABELS_PER_POSITION) & 1, output)

    @override
    def compute_scores(self, expected: Sequence[Any], predicted: Sequence[Any]) -> TaskScores:
        return task_scores.multi_label(self.labels, np.array(expected), np.array(predicted))

    @override
    def find_error(self, row: PredictionRow) -> PredictionError | None:
        is_wrong = (row.predicted > 0) != (row.expected > 0)
        if not is_wrong.any():
            return None

        confidence = 1 / (1 + np.exp(-np.abs(row.predicted[is_wrong].astype(float))))
        return PredictionError(
            row.sample,
            float(confidence.max()),
            row.window,
            np.flatnonzero(row.expected).tolist(),
            np.flatnonzero(row.predicted > 0).tolist(),
        )

    @override
    def describe_error(
        self, error: PredictionError, windows: Windows, tokenizer: Any
    ) -> Description:
        wrong = sorted(set(error.expected) ^ set(error.predicted))
        return Description(self._names(error.expected), self._names(error.predicted), wrong)

    def _names(self, labels: Sequence[int]) -> str:
        return ", ".join(self.labels[label] for label in labels) or "none"

    @override
    def decide(self, predicted: Any) -> Any:
        """Return whether each label is chosen, (K,)."""
        return np.asarray(predicted) > 0

    @override
    def predict(self, model: ModelRunner, rows: Sequence[Row]) -> Iterable[dict[str, Any]]:
        for row in model.logits(*read_inference_texts(rows, self.columns)):
            chosen = np.flatnonzero(row > 0)
            yield {"label": [self.labels[number] for number in chosen]}
