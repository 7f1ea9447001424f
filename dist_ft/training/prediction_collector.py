"""From what a model tells of batches to what was told of each sample, whichever worker saw it."""

from __future__ import annotations

from typing import Any

import numpy as np

from dist_ft.config.sections.task import TaskSection
from dist_ft.core.world import Collectives
from dist_ft.data.batch import IGNORE_INDEX, Batch
from dist_ft.data.encoding.answer_spans import unpack
from dist_ft.data.encoding.task_encoder import LABELS_PER_POSITION
from dist_ft.metrics.task_scores import SCORES, softmax
from dist_ft.training import error_examples

LONGEST_ANSWER = 64
"""Tokens of an answer at most."""

Found = tuple[Any, Any]
"""What was wanted and what was told of one row of a batch."""


class Scorer:
    """Gathers what a model tells, and scores it."""

    def __init__(self, task: TaskSection) -> None:
        self._task = task
        self._rows: list[tuple[int, int, Any, Any]] = []
        self._seen: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}
        self._all: list[tuple[int, int, Any, Any]] = []

    def add(self, batch: Batch, told: np.ndarray) -> None:
        """Take what the model told of `batch`, rows first."""
        read = getattr(self, f"_{self._task.name}")
        for row, (sample, first, size, _) in enumerate(batch.segments.tolist()):
            self._rows.append((sample, first, *read(batch.target_ids[row, :size], told[row])))
            if self._task.name in error_examples.DESCRIBERS:
                self._seen[sample, first] = tuple(  # type: ignore[assignment]
                    array[row, :size].astype(np.int32)
                    for array in (batch.input_ids, batch.target_ids)
                )

    def scores(self, collectives: Collectives) -> dict[str, Any]:
        """Return the metrics over the rows of all workers, on all workers; a collective call."""
        wanted, told = self.gathered(collectives)
        if not wanted:
            return {}
        if self._task.name == "token_classification":
            return SCORES[self._task.name](self._task, wanted, [tags for tags, _ in told])
        return SCORES[self._task.name](self._task, np.array(wanted), np.array(told))

    def gathered(self, collectives: Collectives) -> tuple[list[Any], list[Any]]:
        """Return what was wanted and what was told of each sample of all workers, in order; a collective call."""
        rows = [row for part in collectives.all_gather(self._rows) for row in part]
        rows.sort(key=lambda row: row[:2])
        self._all = rows
        if rows and self._task.name == "question_answering":
            return _best_windows(rows)[:2]
        return [row[2] for row in rows], [row[3] for row in rows]

    def examples(self, collectives: Collectives, tokenizer: Any) -> list[dict[str, Any]]:
        """Return what was most wrong (`examples.described`), on all workers; a collective call, after `scores`."""
        answers = _answers(self._all) if self._task.name == "question_answering" else ()
        picks = error_examples.worst(self._task, self._all, answers)
        own = {key: self._seen[key] for pick in picks for key in pick.keys if key in self._seen}
        seen = {key: value for part in collectives.all_gather(own) for key, value in part.items()}
        return error_examples.described(self._task, picks, seen, tokenizer)

    def _sequence_classification(self, labels: np.ndarray, told: np.ndarray) -> Found:
        return int(labels[0]), told

    def _multi_label(self, labels: np.ndarray, told: np.ndarray) -> Found:
        numbers = np.arange(len(told))
        return labels[numbers // LABELS_PER_POSITION] >> (numbers % LABELS_PER_POSITION) & 1, told

    def _regression(self, labels: np.ndarray, told: np.ndarray) -> Found:
        return float(labels[:1].astype(np.int32).view(np.float32)[0]), float(told)

    def _token_classification(self, labels: np.ndarray, told: np.ndarray) -> Found:
        words = labels != IGNORE_INDEX
        logits = told[: len(labels)][words]
        return labels[words], (logits.argmax(-1), softmax(logits.astype(float)).max(-1))

    def _question_answering(self, labels: np.ndarray, told: np.ndarray) -> Found:
        start = int((labels != IGNORE_INDEX).argmax())
        span = unpack(int(labels[start]))
        return (start, span.last), best_span(
            told[: len(labels)], span.begin, len(labels) - span.tail
        )

    def _embedding(self, labels: np.ndarray, told: np.ndarray) -> Found:
        return told[0], told[1]

    def _masked_lm(self, labels: np.ndarray, told: np.ndarray) -> Found:
        wanted = labels != IGNORE_INDEX
        return (int((told[: len(labels)] == labels)[wanted].sum()), int(wanted.sum())), 0

    def _seq2seq(self, labels: np.ndarray, told: np.ndarray) -> Found:
        wanted = labels[labels != IGNORE_INDEX]
        return (int((told[: len(wanted)] == wanted).sum()), len(wanted)), 0


def best_span(logits: np.ndarray, begin: int, stop: int) -> tuple[int, int, float]:
    """Return (first, last, score) of the best span in (T, 2) logits of starts and ends; (0, 0, ...): there is none.

    It lies within the context, tokens [begin, stop): neither in the question nor on what frames both. The score is that
    of the span over that of no answer, which the first position stands for.
    """
    starts, ends = logits[:, 0].astype(float), logits[:, 1].astype(float)
    sums = starts[:, None] + ends[None, :]
    length = np.arange(len(starts))[None, :] - np.arange(len(starts))[:, None]
    sums[(length < 0) | (length >= LONGEST_ANSWER)] = -np.inf
    outside = np.ones(len(starts), dtype=bool)
    outside[max(1, begin) : stop] = False
    sums[outside, :], sums[:, outside] = -np.inf, -np.inf
    first, last = divmod(int(sums.argmax()), len(starts))
    score = float(sums[first, last] - starts[0] - ends[0])
    return (first, last, score) if score > 0 else (0, 0, score)


def _best_windows(
    rows: list[tuple[int, int, Any, Any]],
) -> tuple[list[Any], list[Any], list[float]]:
    """Return [window, first, last] wanted and told of each sample, of its windows the best, and the score of that.

    Windows share tokens: an answer may lie in two of them, and is told rightly in either.
    """
    golds: dict[int, dict[int, tuple[int, int, int]]] = {}
    told: dict[int, tuple[float, tuple[int, int, int]]] = {}
    for sample, window, gold, (first, last, score) in rows:
        own = golds.setdefault(sample, {})
        if gold != (0, 0):
            own[window] = (window, *gold)
        found = (window, first, last) if (first, last) != (0, 0) else (-1, 0, 0)
        if sample not in told or score > told[sample][0]:
            told[sample] = score, found
    wanted = [
        own.get(told[sample][1][0], next(iter(own.values()), (-1, 0, 0)))
        for sample, own in golds.items()
    ]
    return wanted, [told[sample][1] for sample in golds], [told[sample][0] for sample in golds]


def _answers(rows: list[tuple[int, int, Any, Any]]) -> list[tuple[int, int, Any, Any, float]]:
    """Return (sample, window to show, wanted, told, how sure) of each question."""
    first = {row[0]: row[1] for row in reversed(rows)}
    found = zip(dict.fromkeys(row[0] for row in rows), *_best_windows(rows), strict=True)
    return [
        (
            sample,
            next((side[0] for side in (told, wanted) if side[0] >= 0), first[sample]),
            wanted,
            told,
            abs(score),
        )
        for sample, wanted, told, score in found
    ]
