"""From the output of a model for one row to the expected and the predicted value. Pure.

Dimensions: T tokens of a row, K labels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dist_ft.data.batch import IGNORE_INDEX
from dist_ft.data.encoding.answer_spans import unpack
from dist_ft.data.encoding.task_encoder import LABELS_PER_POSITION
from dist_ft.metrics.task_scores import softmax

MAX_ANSWER_TOKENS = 64
"""Longest answer that is predicted, in tokens."""


class RowResult(NamedTuple):
    """The label and the prediction of one row, in the form that depends on the task.

    Attributes:
        expected: a label number; 0 or 1 for each label (K,); a number; tags (words,); of an answer
            (first, last) token, (0, 0) for no answer; [correct, all] tokens; a vector.
        predicted: logits (K,); a number; (tags, probabilities) of words; a `Span`; a vector.
    """

    expected: Any
    predicted: Any


class PredictionRow(NamedTuple):
    """A `RowResult` and where it comes from: the sample's id and the first token of its window."""

    sample: int
    window: int
    expected: Any
    predicted: Any


class Span(NamedTuple):
    """The first and the last token of an answer, (0, 0) for no answer, and the score of it."""

    first: int
    last: int
    score: float


class AnswerLocation(NamedTuple):
    """An answer's window (the window's first token) and its first and last token in the window."""

    window: int
    first: int
    last: int


NO_ANSWER = AnswerLocation(-1, 0, 0)


class AnswerPrediction(NamedTuple):
    """The expected and the predicted answer of one question, and the score of the prediction."""

    sample: int
    expected: AnswerLocation
    predicted: AnswerLocation
    score: float


def _read_label(labels: np.ndarray, logits: np.ndarray) -> RowResult:
    return RowResult(int(labels[0]), logits)


def _read_label_set(labels: np.ndarray, logits: np.ndarray) -> RowResult:
    """Unpack the bits of the label set, several to a position."""
    numbers = np.arange(len(logits))
    packed = labels[numbers // LABELS_PER_POSITION]
    return RowResult(packed >> (numbers % LABELS_PER_POSITION) & 1, logits)


def _read_number(labels: np.ndarray, value: np.ndarray) -> RowResult:
    """Read the bits of the float32 label."""
    target = labels[:1].astype(np.int32).view(np.float32)[0]
    return RowResult(float(target), float(value))


def _read_tags(labels: np.ndarray, output: np.ndarray) -> RowResult:
    """Read the tags at the first tokens of a row's words; `output`: (T, K) logits."""
    is_word = labels != IGNORE_INDEX
    logits = output[: len(labels)][is_word]
    probabilities = softmax(logits.astype(float)).max(-1)
    return RowResult(labels[is_word], (logits.argmax(-1), probabilities))


def _read_answer(labels: np.ndarray, output: np.ndarray) -> RowResult:
    """Read an answer; `output`: (T, 2) logits of starts and ends."""
    first = int((labels != IGNORE_INDEX).argmax())
    span = unpack(int(labels[first]))
    predicted = best_span(output[: len(labels)], span.context_start, len(labels) - span.tail)
    return RowResult((first, span.last), predicted)


def _read_vectors(labels: np.ndarray, output: np.ndarray) -> RowResult:
    return RowResult(output[0], output[1])


def _count_tokens(labels: np.ndarray, predicted: np.ndarray) -> RowResult:
    """Count correct tokens; `predicted`: (T,) a token for each position."""
    is_target = labels != IGNORE_INDEX
    is_correct = (predicted[: len(labels)] == labels)[is_target]
    return RowResult((int(is_correct.sum()), int(is_target.sum())), 0)


def _count_target_tokens(labels: np.ndarray, predicted: np.ndarray) -> RowResult:
    """Count correct tokens of a decoder; `predicted`: a token for each target, without gaps."""
    targets = labels[labels != IGNORE_INDEX]
    num_correct = int((predicted[: len(targets)] == targets).sum())
    return RowResult((num_correct, len(targets)), 0)


ROW_READERS: Mapping[str, Callable[[np.ndarray, np.ndarray], RowResult]] = {
    "sequence_classification": _read_label,
    "multi_label": _read_label_set,
    "regression": _read_number,
    "token_classification": _read_tags,
    "question_answering": _read_answer,
    "embedding": _read_vectors,
    "masked_lm": _count_tokens,
    "seq2seq": _count_target_tokens,
}
"""For each task, the function from labels (T,) and the model's output of a row to its result."""


def best_span(logits: np.ndarray, start: int, stop: int) -> Span:
    """Return the best span in (T, 2) logits of starts and ends; first and last are 0 for no answer.

    The span lies within the context, tokens [start, stop), not in the question or in special
    tokens. Its score is its logits minus those of no answer, which the first position stands for.
    """
    starts, ends = logits[:, 0].astype(float), logits[:, 1].astype(float)
    sums = starts[:, None] + ends[None, :]  # (T, T): a row for each start, a column for each end

    positions = np.arange(len(starts))
    distance = positions[None, :] - positions[:, None]
    sums[(distance < 0) | (distance >= MAX_ANSWER_TOKENS)] = -np.inf
    is_outside = np.ones(len(starts), dtype=bool)
    is_outside[max(1, start) : stop] = False
    sums[is_outside, :], sums[:, is_outside] = -np.inf, -np.inf

    first, last = divmod(int(sums.argmax()), len(starts))
    score = float(sums[first, last] - starts[0] - ends[0])
    return Span(first, last, score) if score > 0 else Span(0, 0, score)


def best_answers(rows: Sequence[PredictionRow]) -> list[AnswerPrediction]:
    """Return the best prediction of each question over its windows, in the order of `rows`.

    Windows overlap: an answer may lie in two of them, and a prediction in either is correct. The
    expected answer is the one in the predicted window if that has one, else the first.
    """
    answers: dict[int, dict[int, AnswerLocation]] = {}  # by sample, by window
    best: dict[int, tuple[float, AnswerLocation]] = {}
    for sample, window, expected, span in rows:
        answers_of_sample = answers.setdefault(sample, {})
        if expected != (0, 0):
            answers_of_sample[window] = AnswerLocation(window, *expected)

        predicted = NO_ANSWER
        if (span.first, span.last) != (0, 0):
            predicted = AnswerLocation(window, span.first, span.last)
        if sample not in best or span.score > best[sample][0]:
            best[sample] = span.score, predicted

    predictions = []
    for sample, answers_of_sample in answers.items():
        score, predicted = best[sample]
        first_answer = next(iter(answers_of_sample.values()), NO_ANSWER)
        expected = answers_of_sample.get(predicted.window, first_answer)
        predictions.append(AnswerPrediction(sample, expected, predicted, score))

    return predictions
