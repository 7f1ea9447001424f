"""The base class of all tasks: one class says everything about a task.

A task of your own is a subclass. It must define `auto_class`, `read`, `compute_loss`, `read_output`
and `compute_scores`; docs/tasks.md has an example. The config names it by its import path, such as
`task.name: mypackage.tasks:MyTask`.

What a class can set and override, and where that is used:

| | defined in | used by |
| --- | --- | --- |
| facts, `check` | `config.task_facts` | the config's checks |
| reading and labeling rows | `data.encoding.data_task` | the data pipeline |
| class of the model, head, loss | `model.model_task` | loading and training |
| outputs, metrics, errors, predictions | here | evaluation, reports, inference |

Dimensions: B rows of a batch, T tokens of a row, K labels.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Protocol, cast

import numpy as np

from dist_ft.config.sections.task import TaskSection
from dist_ft.config.task_facts import task_class
from dist_ft.core.errors import ModelError
from dist_ft.data.sources.discovery import Row
from dist_ft.metrics.task_scores import TaskScores
from dist_ft.model.model_task import ModelTask
from dist_ft.tasks.results import (
    Description,
    PredictionError,
    PredictionRow,
    Predictions,
    RowResult,
    Windows,
)


class ModelRunner(Protocol):
    """A loaded model as `Task.predict` uses it.

    Attributes:
        tokenizer: tokenizer of the model.
        max_tokens: most tokens of an input.
    """

    tokenizer: Any
    max_tokens: int

    def encode(self, *texts: list[Any], **options: Any) -> Any:
        """Return token ids and mask (B, T) of texts or pairs, padded and truncated."""

    def forward(self, encoded: Any) -> Any:
        """Return the outputs of the model, virtual tokens in front."""

    def without_virtual(self, values: Any) -> Any:
        """Return values per token (B, T, ...) without those of the virtual tokens in front."""

    def logits(self, *texts: list[str]) -> np.ndarray:
        """Return the logits (B, K) of a head on texts, or on pairs of them."""

    def label_scores(self, *texts: list[str]) -> np.ndarray:
        """Return the scores (B, K) of labels: of the head, or of their words where it prompts."""


class Task(ModelTask):
    """A task: how rows are read and labeled, what the model computes, and how that is scored."""

    describes_errors: ClassVar[bool] = False
    """`find_error` and `describe_error` are defined: evaluations store their worst errors."""

    @abstractmethod
    def read_output(self, labels: np.ndarray, output: np.ndarray) -> RowResult:
        """Return the expected and the predicted value of a row.

        Args:
            labels: (T,) labels of the row's tokens, as `label_tokens` set them.
            output: what `compute_loss` returned as the outputs of this row.
        """

    @abstractmethod
    def compute_scores(self, expected: Sequence[Any], predicted: Sequence[Any]) -> TaskScores:
        """Return the metrics of all samples; each has one value of `read_output` in both lists."""

    def combine_windows(self, rows: Sequence[PredictionRow]) -> Predictions:
        """Return one expected and predicted value per sample from its rows, which may be several.

        `rows` are sorted by sample and window.
        """
        return Predictions([row.expected for row in rows], [row.predicted for row in rows])

    def find_errors(self, rows: Sequence[PredictionRow]) -> list[PredictionError]:
        """Return the errors among the rows of all workers."""
        results = [self.find_error(row) for row in rows]
        return [error for error in results if error is not None]

    def find_error(self, row: PredictionRow) -> PredictionError | None:
        """Return the error of a row, or None if its prediction is right."""
        return None

    def describe_error(
        self, error: PredictionError, windows: Windows, tokenizer: Any
    ) -> Description:
        """Return an error as text; `windows` holds at least its `window_keys`."""
        raise NotImplementedError

    def score_for_attribution(self, outputs: Any, at: list[Any]) -> Any:
        """Return the scores (B,) of an error's prediction; their gradients are attributed.

        Args:
            outputs: of the model.
            at: `Description.at` of the error.
        """
        return outputs.logits[:, at].sum(1)

    def decide(self, predicted: Any) -> Any:
        """Return what the model decided for a sample, from its predicted value: an array."""
        return np.asarray(predicted)

    def predict(self, model: ModelRunner, rows: Sequence[Row]) -> Iterable[dict[str, Any]]:
        """Yield the prediction of each row as JSON values.

        Raises:
            ModelError: the class does not define it.
        """
        raise ModelError(
            f"task.name={self.name}: the task does not say how to predict. A method `predict` is "
            "needed. Define it (see docs/tasks.md)."
        )


def make_task(section: TaskSection) -> Task:
    """Return the task of a section of the config."""
    return cast("Task", task_class(section.name)(section))
