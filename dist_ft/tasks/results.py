"""What a model predicted for a row: values, errors, and their description.

Dimensions: T tokens of a row, K labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

WindowKey = tuple[int, int]
"""Sample id and the first token of a window."""


class Window(NamedTuple):
    """Token ids (T,) and labels (T,) of a window, as the model saw them."""

    ids: np.ndarray
    labels: np.ndarray


Windows = Mapping[WindowKey, Window]


class RowResult(NamedTuple):
    """The expected and the predicted value of one row, in the form of the task."""

    expected: Any
    predicted: Any


class PredictionRow(NamedTuple):
    """A `RowResult` and where it comes from: the sample's id and the first token of its window."""

    sample: int
    window: int
    expected: Any
    predicted: Any


class Predictions(NamedTuple):
    """Expected and predicted values, one of each for every sample, in the order of samples."""

    expected: list[Any]
    predicted: list[Any]


@dataclass(frozen=True)
class PredictionError:
    """A row whose prediction is wrong.

    Attributes:
        sample: id.
        score: confidence of the prediction: a probability (labels, tags), the difference (numbers),
            or a sum of logits (answers).
        window: first token of the window that is shown.
        expected: label in the form of the task.
        predicted: prediction in the same form.
        other_windows: further windows whose tokens are needed to describe the error.
    """

    sample: int
    score: float
    window: int
    expected: Any
    predicted: Any
    other_windows: tuple[int, ...] = ()

    @property
    def window_keys(self) -> list[WindowKey]:
        """The windows whose tokens are needed to describe the error."""
        windows = dict.fromkeys((self.window, *self.other_windows))
        return [(self.sample, window) for window in windows]


class Description(NamedTuple):
    """An error as text.

    Attributes:
        expected: the label.
        predicted: the prediction.
        at: what is wrong (JSON): predicted label numbers, or token positions (of wrong tags, with
            the predicted tag; of the predicted answer).
    """

    expected: str
    predicted: str
    at: list[Any]


def decode_tokens(tokenizer: Any, ids: np.ndarray) -> str:
    """Return token ids as text, without special tokens."""
    return str(tokenizer.decode(ids.tolist(), skip_special_tokens=True)).strip()
