"""The best answer to a question, in one window and over all of them. Pure.

Dimensions: T tokens of a window.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dist_ft.tasks.results import PredictionRow

MAX_ANSWER_TOKENS = 64
"""Longest answer that is predicted, in tokens."""


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
