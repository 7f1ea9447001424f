"""What a model got most wrong at an evaluation: a few rows, with what was wanted, what it told and how sure it was.

Guarantees: the same rows at every world size, for they are chosen from what all workers gathered; ties go to the lower
sample id. Texts are the tokens the model saw, decoded; `ids` are those tokens, so that the row can be asked again.
Covers labels (one, many, numbers), tags and answers; other tasks keep none. Pure but for the tokenizer it is handed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dist_ft.config.sections.task import TaskSection
from dist_ft.data.batch import IGNORE_INDEX
from dist_ft.metrics.task_scores import softmax

MOST = 20
"""Examples kept of an evaluation."""

Row = tuple[int, int, Any, Any]
"""Sample id, first token of the window, what was wanted, what was told (see `scoring`)."""
Key = tuple[int, int]
Seen = Mapping[Key, tuple[np.ndarray, np.ndarray]]
"""Token ids (T,) and labels (T,) of a window, by (sample id, first token)."""


@dataclass(frozen=True)
class Pick:
    """A row a model was wrong about.

    Attributes:
        sample: id.
        score: how sure of it the model was: a share (labels, tags), a difference (numbers), a sum of logits (answers).
        window: first token of the window that is shown.
        wanted: as the task tells it; of an answer (window, first, last), window -1: there is none.
        told: the same as told.
    """

    sample: int
    score: float
    window: int
    wanted: Any
    told: Any

    @property
    def keys(self) -> list[Key]:
        """Return the windows that are needed to tell it."""
        windows = [
            self.window,
            *(side[0] for side in (self.wanted, self.told) if isinstance(side, tuple)),
        ]
        return [(self.sample, window) for window in dict.fromkeys(windows) if window >= 0]


def worst(
    task: TaskSection, rows: Sequence[Row], answers: Sequence[tuple[int, int, Any, Any, float]] = ()
) -> list[Pick]:
    """Return at most MOST rows the model was wrong about, the most confident first.

    Args:
        task: of the run.
        rows: of all workers.
        answers: of questions, in place of rows: (sample, window shown, wanted, told, score).
    """
    if task.name == "question_answering":
        found = [
            Pick(sample, score, window, wanted, told)
            for sample, window, wanted, told, score in answers
            if wanted != told
        ]
    else:
        find = FINDERS.get(task.name)
        found = [pick for row in rows if (pick := find(*row)) is not None] if find else []
    found = [pick for pick in found if math.isfinite(pick.score)]
    return sorted(found, key=lambda pick: (-pick.score, pick.sample))[:MOST]


def _label(sample: int, window: int, wanted: int, told: np.ndarray) -> Pick | None:
    shares = softmax(told.astype(float))
    most = int(shares.argmax())
    return Pick(sample, float(shares[most]), window, wanted, most) if most != wanted else None


def _labels(sample: int, window: int, wanted: np.ndarray, told: np.ndarray) -> Pick | None:
    wrong = (told > 0) != (wanted > 0)
    if not wrong.any():
        return None
    sure = 1 / (1 + np.exp(-np.abs(told[wrong].astype(float))))
    return Pick(
        sample,
        float(sure.max()),
        window,
        np.flatnonzero(wanted).tolist(),
        np.flatnonzero(told > 0).tolist(),
    )


def _number(sample: int, window: int, wanted: float, told: float) -> Pick | None:
    return Pick(sample, abs(told - wanted), window, wanted, told) if told != wanted else None


def _tags(
    sample: int, window: int, wanted: np.ndarray, told: tuple[np.ndarray, np.ndarray]
) -> Pick | None:
    tags, shares = told
    wrong = tags != wanted
    return Pick(sample, float(shares[wrong].max()), window, wanted, tags) if wrong.any() else None


FINDERS: dict[str, Callable[..., Pick | None]] = {
    "sequence_classification": _label,
    "multi_label": _labels,
    "regression": _number,
    "token_classification": _tags,
}


def described(
    task: TaskSection, picks: Sequence[Pick], seen: Seen, tokenizer: Any
) -> list[dict[str, Any]]:
    """Return picks as JSON values: sample, window, text, wanted, told, score, ids and `at`.

    `at` is what was wrong about it: label numbers told, or token places (of tags that are wrong; of the answer told).
    """
    found = []
    for pick in picks:
        ids, labels = seen[pick.sample, pick.window]
        wanted, told, at = DESCRIBERS[task.name](task, pick, seen, labels, tokenizer)
        found.append(
            {
                "sample": pick.sample,
                "window": pick.window,
                "text": _text(tokenizer, ids),
                "wanted": wanted,
                "told": told,
                "score": round(pick.score, 6),
                "ids": ids.tolist(),
                "at": at,
            }
        )
    return found


def _text(tokenizer: Any, ids: np.ndarray) -> str:
    return str(tokenizer.decode(ids.tolist(), skip_special_tokens=True)).strip()


def _told_label(task: TaskSection, pick: Pick, *_: Any) -> tuple[str, str, list[int]]:
    return task.labels[pick.wanted], task.labels[pick.told], [pick.told]


def _told_labels(task: TaskSection, pick: Pick, *_: Any) -> tuple[str, str, list[int]]:
    wanted, told = (
        ", ".join(task.labels[label] for label in side) or "none"
        for side in (pick.wanted, pick.told)
    )
    return wanted, told, sorted(set(pick.wanted) ^ set(pick.told))


def _told_number(task: TaskSection, pick: Pick, *_: Any) -> tuple[str, str, list[int]]:
    return f"{pick.wanted:g}", f"{pick.told:g}", [0]


def _told_tags(
    task: TaskSection, pick: Pick, seen: Seen, labels: np.ndarray, tokenizer: Any
) -> tuple[str, str, list[list[int]]]:
    """Name the words whose tags are wrong, with both tags."""
    ids = seen[pick.sample, pick.window][0]
    places = np.flatnonzero(labels != IGNORE_INDEX)
    ends = np.append(places[1:], len(ids))
    wrong = np.flatnonzero(pick.wanted != pick.told)
    words = [_text(tokenizer, ids[places[word] : ends[word]]) for word in wrong]
    wanted, told = (
        "; ".join(
            f"{name}: {task.labels[side[word]]}" for name, word in zip(words, wrong, strict=True)
        )
        for side in (pick.wanted, pick.told)
    )
    return wanted, told, [[int(places[word]), int(pick.told[word])] for word in wrong]


def _told_answer(
    task: TaskSection, pick: Pick, seen: Seen, labels: np.ndarray, tokenizer: Any
) -> tuple[str, str, list[int]]:
    def of(side: tuple[int, int, int]) -> str:
        window, first, last = side
        return (
            _text(tokenizer, seen[pick.sample, window][0][first : last + 1])
            if window >= 0
            else "no answer"
        )

    return of(pick.wanted), of(pick.told), [pick.told[1], pick.told[2]]


DESCRIBERS: dict[str, Callable[..., tuple[str, str, Any]]] = {
    "sequence_classification": _told_label,
    "multi_label": _told_labels,
    "regression": _told_number,
    "token_classification": _told_tags,
    "question_answering": _told_answer,
}
