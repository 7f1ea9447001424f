"""The most confident errors of an evaluation: rows with the expected and the predicted label.

Guarantees: the rows are the same at every world size, for they are chosen from those of all
workers; ties go to the lower sample id. Texts are the tokens that the model saw, decoded; `ids` are
those tokens, so that the model can be run on the row again. Covers labels, label sets, numbers,
tags and answers; other tasks have no examples. Pure, but for the tokenizer that is passed in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypedDict

from dist_ft.tasks.base import Task
from dist_ft.tasks.results import PredictionError, PredictionRow, Windows, decode_tokens

MAX_EXAMPLES = 20
"""Examples stored with an evaluation."""


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


def select_errors(task: Task, rows: Sequence[PredictionRow]) -> list[PredictionError]:
    """Return at most `MAX_EXAMPLES` wrong predictions among the rows of all workers.

    The most confident comes first.
    """
    errors = [error for error in task.find_errors(rows) if math.isfinite(error.score)]
    return sorted(errors, key=lambda error: (-error.score, error.sample))[:MAX_EXAMPLES]


def describe_errors(
    task: Task,
    errors: Sequence[PredictionError],
    windows: Windows,
    tokenizer: Any,
) -> list[ErrorExample]:
    """Return errors with decoded texts; `windows` holds at least their `window_keys`."""
    examples = []
    for error in errors:
        window = windows[error.sample, error.window]
        description = task.describe_error(error, windows, tokenizer)
        examples.append(
            ErrorExample(
                sample=error.sample,
                window=error.window,
                text=decode_tokens(tokenizer, window.ids),
                expected=description.expected,
                predicted=description.predicted,
                score=round(error.score, 6),
                ids=window.ids.tolist(),
                at=description.at,
            )
        )

    return examples
