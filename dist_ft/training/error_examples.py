"""The most confident errors of an evaluation: rows with the expected and the predicted label.

Guarantees: the rows are the same at every world size, for they are chosen from those of all
workers; ties go to the lower sample id. Texts are the tokens that the model saw, decoded; `ids` are
those tokens, so that the model can be run on the row again. Covers labels, label sets, numbers,
tags and answers; other tasks have no examples. Pure, but for the tokenizer that is passed in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypedDict

import numpy as np

from dist_ft.config.sections.task import TaskSection
from dist_ft.data.batch import IGNORE_INDEX
from dist_ft.metrics.task_scores import softmax
from dist_ft.training.predictions import AnswerLocation, PredictionRow, best_answers

MAX_EXAMPLES = 20
"""Examples stored with an evaluation."""

WindowKey = tuple[int, int]
"""Sample id and the first token of a window."""


class Window(NamedTuple):
    """Token ids (T,) and labels (T,) of a window, as the model saw them."""

    ids: np.ndarray
    labels: np.ndarray


class ErrorExample(TypedDict):
    """An error as it is stored and reported (JSON).

    Attributes:
        sample: id.
        window: first token of the window that is shown.
        text: text of the window.
        expected: the label, as text.
        predicted: the prediction, as text.
        score: confidence of the prediction; see `PredictionError`.
        ids: token ids of the window.
        at: what is wrong: predicted label numbers, or token positions (of wrong tags, with the
            predicted tag; of the predicted answer).
    """

    sample: int
    window: int
    text: str
    expected: str
    predicted: str
    score: float
    ids: list[int]
    at: list[Any]


@dataclass(frozen=True)
class PredictionError:
    """A row whose prediction is wrong.

    Attributes:
        sample: id.
        score: confidence of the prediction: a probability (labels, tags), the difference (numbers),
            or a sum of logits (answers).
        window: first token of the window that is shown.
        expected: label in the task's own form; for an answer, an `AnswerLocation`.
        predicted: prediction in the same form.
    """

    sample: int
    score: float
    window: int
    expected: Any
    predicted: Any

    @property
    def window_keys(self) -> list[WindowKey]:
        """The windows whose tokens are needed to describe the error."""
        windows = [self.window]
        for answer in (self.expected, self.predicted):
            if isinstance(answer, AnswerLocation):
                windows.append(answer.window)
        return [(self.sample, window) for window in dict.fromkeys(windows) if window >= 0]


class _Description(NamedTuple):
    """The texts of an error, and `at` of `ErrorExample`."""

    expected: str
    predicted: str
    at: list[Any]


def select_errors(task: TaskSection, rows: Sequence[PredictionRow]) -> list[PredictionError]:
    """Return at most `MAX_EXAMPLES` wrong predictions among the rows of all workers.

    The most confident comes first.
    """
    if task.name == "question_answering":
        errors = _wrong_answers(rows)
    elif task.name in _CHECKS:
        check = _CHECKS[task.name]
        results = [check(row) for row in rows]
        errors = [error for error in results if error is not None]
    else:
        errors = []

    errors = [error for error in errors if math.isfinite(error.score)]
    return sorted(errors, key=lambda error: (-error.score, error.sample))[:MAX_EXAMPLES]


def _check_label(row: PredictionRow) -> PredictionError | None:
    probabilities = softmax(row.predicted.astype(float))
    label = int(probabilities.argmax())
    if label == row.expected:
        return None
    return PredictionError(row.sample, float(probabilities[label]), row.window, row.expected, label)


def _check_label_set(row: PredictionRow) -> PredictionError | None:
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


def _check_number(row: PredictionRow) -> PredictionError | None:
    if row.predicted == row.expected:
        return None
    difference = abs(row.predicted - row.expected)
    return PredictionError(row.sample, difference, row.window, row.expected, row.predicted)


def _check_tags(row: PredictionRow) -> PredictionError | None:
    tags, probabilities = row.predicted
    is_wrong = tags != row.expected
    if not is_wrong.any():
        return None
    confidence = float(probabilities[is_wrong].max())
    return PredictionError(row.sample, confidence, row.window, row.expected, tags)


_CHECKS: Mapping[str, Callable[[PredictionRow], PredictionError | None]] = {
    "sequence_classification": _check_label,
    "multi_label": _check_label_set,
    "regression": _check_number,
    "token_classification": _check_tags,
}


def _wrong_answers(rows: Sequence[PredictionRow]) -> list[PredictionError]:
    """Return the questions that are answered wrongly.

    The window shown is that of the predicted answer, else of the expected one, else the first.
    """
    first_window: dict[int, int] = {}
    for row in rows:
        first_window.setdefault(row.sample, row.window)

    errors = []
    for sample, expected, predicted, score in best_answers(rows):
        if expected == predicted:
            continue
        window = first_window[sample]
        for answer in (expected, predicted):  # the predicted one last: it counts more
            if answer.window >= 0:
                window = answer.window
        errors.append(PredictionError(sample, abs(score), window, expected, predicted))

    return errors


def describe_errors(
    task: TaskSection,
    errors: Sequence[PredictionError],
    windows: Mapping[WindowKey, Window],
    tokenizer: Any,
) -> list[ErrorExample]:
    """Return errors with decoded texts; `windows` holds at least their `window_keys`."""
    examples = []
    for error in errors:
        window = windows[error.sample, error.window]
        description = DESCRIBERS[task.name](task, error, windows, tokenizer)
        examples.append(
            ErrorExample(
                sample=error.sample,
                window=error.window,
                text=_decode(tokenizer, window.ids),
                expected=description.expected,
                predicted=description.predicted,
                score=round(error.score, 6),
                ids=window.ids.tolist(),
                at=description.at,
            )
        )

    return examples


def _decode(tokenizer: Any, ids: np.ndarray) -> str:
    return str(tokenizer.decode(ids.tolist(), skip_special_tokens=True)).strip()


def _describe_label(task: TaskSection, error: PredictionError, *_: Any) -> _Description:
    return _Description(
        task.labels[error.expected], task.labels[error.predicted], [error.predicted]
    )


def _describe_label_set(task: TaskSection, error: PredictionError, *_: Any) -> _Description:
    def names(labels: Sequence[int]) -> str:
        return ", ".join(task.labels[label] for label in labels) or "none"

    wrong = sorted(set(error.expected) ^ set(error.predicted))
    return _Description(names(error.expected), names(error.predicted), wrong)


def _describe_number(task: TaskSection, error: PredictionError, *_: Any) -> _Description:
    return _Description(f"{error.expected:g}", f"{error.predicted:g}", [0])


def _describe_tags(
    task: TaskSection,
    error: PredictionError,
    windows: Mapping[WindowKey, Window],
    tokenizer: Any,
) -> _Description:
    """List the words whose tags are wrong, with the expected and the predicted tags."""
    ids, labels = windows[error.sample, error.window]
    starts = np.flatnonzero(labels != IGNORE_INDEX)  # first token of each word
    stops = np.append(starts[1:], len(ids))
    wrong_words = np.flatnonzero(error.expected != error.predicted)
    words = [_decode(tokenizer, ids[starts[word] : stops[word]]) for word in wrong_words]

    def tagged(tags: np.ndarray) -> str:
        pairs = zip(words, wrong_words, strict=True)
        return "; ".join(f"{text}: {task.labels[tags[word]]}" for text, word in pairs)

    at = [[int(starts[word]), int(error.predicted[word])] for word in wrong_words]
    return _Description(tagged(error.expected), tagged(error.predicted), at)


def _describe_answer(
    task: TaskSection,
    error: PredictionError,
    windows: Mapping[WindowKey, Window],
    tokenizer: Any,
) -> _Description:
    def text(answer: AnswerLocation) -> str:
        if answer.window < 0:
            return "no answer"
        ids = windows[error.sample, answer.window].ids
        return _decode(tokenizer, ids[answer.first : answer.last + 1])

    predicted = error.predicted
    return _Description(text(error.expected), text(predicted), [predicted.first, predicted.last])


DESCRIBERS: Mapping[str, Callable[..., _Description]] = {
    "sequence_classification": _describe_label,
    "multi_label": _describe_label_set,
    "regression": _describe_number,
    "token_classification": _describe_tags,
    "question_answering": _describe_answer,
}
"""For each task with examples, the function that describes an error."""
