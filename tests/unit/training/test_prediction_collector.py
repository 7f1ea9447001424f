"""Model outputs for batches become predictions for samples, on whichever worker they are."""

from __future__ import annotations

import numpy as np
import pytest

from dist_ft.config.schema import TaskSection
from dist_ft.core.world import Collectives
from dist_ft.data.batch import IGNORE_INDEX, Batch
from dist_ft.data.encoding import answer_spans
from dist_ft.tasks.answers import best_span
from dist_ft.training.prediction_collector import PredictionCollector


def task(name: str, *labels: str) -> TaskSection:
    return TaskSection.model_validate({"name": name, "labels": labels})


def batch(labels: list[list[int]], samples: list[int], sizes: list[int], first: int = 0) -> Batch:
    segments = np.array(
        [[sample, first, size, 0] for sample, size in zip(samples, sizes, strict=True)]
    )
    targets = np.array(labels, np.int64)
    return Batch(np.zeros_like(targets), targets, np.zeros_like(targets), segments, 0)


def packed(last: int, start: int = 1, tail: int = 0) -> int:
    return answer_spans.pack(answer_spans.AnswerSpan(last, start, tail))


def test_answer_lies_in_the_context():
    """Spans in the question or in the special tokens at the end are not answers."""
    collector, logits = PredictionCollector(task("question_answering")), np.full((1, 8, 2), -5.0)
    logits[0, 2] = 9  # in the question
    logits[0, 7] = 8  # the last separator
    logits[0, 4, 0], logits[0, 5, 1] = 3, 3
    collector.add(
        batch([[IGNORE_INDEX] * 4 + [packed(5, 4, 1)] + [IGNORE_INDEX] * 3], [0], [8]), logits
    )
    assert collector.compute_scores(Collectives()).values == {"exact_match": 1.0, "f1": 1.0}
    assert collector._rows[0][3][:2] == (4, 5)


@pytest.mark.parametrize(
    "span",
    [
        answer_spans.AnswerSpan(0, 0, 0),
        answer_spans.AnswerSpan(16383, 16383, 7),
        answer_spans.AnswerSpan(5, 16000, 1),
    ],
)
def test_spans_are_packed_into_an_int32(span):
    number = answer_spans.pack(span)
    assert answer_spans.unpack(int(np.int32(number))) == span and number >= 0
    assert answer_spans.last_tokens(np.array([number])).tolist() == [span.last]


def test_padding_is_not_scored():
    collector = PredictionCollector(task("token_classification", "O", "B-x"))
    logits = np.zeros((2, 4, 2))
    logits[0, 1, 1] = 1
    logits[:, 3, 1] = 1  # in the padding of the first row
    collector.add(
        batch(
            [[IGNORE_INDEX, 1, IGNORE_INDEX, IGNORE_INDEX], [IGNORE_INDEX, 0, 0, 1]], [0, 1], [3, 4]
        ),
        logits,
    )
    assert collector.compute_scores(Collectives()).values["accuracy"] == 1


def test_samples_of_two_workers_are_scored_once_in_order():
    class Two(Collectives):
        def all_gather(self, value):
            return [value, other]

    section = task("regression")
    mine, theirs = PredictionCollector(section), PredictionCollector(section)
    bits = [int(np.float32(value).view(np.int32)) for value in (1.0, 2.0, 3.0)]
    mine.add(batch([[bits[2]]], [2], [1]), np.array([3.0]))
    theirs.add(batch([[bits[0]], [bits[1]]], [0, 1], [1, 1]), np.array([1.0, 3.0]))
    other = theirs._rows
    assert mine.compute_scores(Two()).values["mse"] == pytest.approx(1 / 3)


def test_spans_are_ordered_and_bounded():
    logits = np.full((100, 2), -5.0)
    logits[3, 0], logits[5, 1] = 4, 4
    assert best_span(logits, 1, 100)[:2] == (3, 5)
    logits[1, 1] = 9  # ends before it starts
    assert best_span(logits, 1, 100)[:2] == (3, 5)
    logits[99, 1] = 9  # too long
    assert best_span(logits, 1, 100)[:2] == (3, 5)
    logits[0] = 6
    assert best_span(logits, 1, 100)[:2] == (0, 0), "no answer is likelier"


def test_best_window_of_a_question_counts():
    collector = PredictionCollector(task("question_answering"))
    logits = np.full((2, 4, 2), -5.0)
    logits[0, 1], logits[1, 2] = 1, 4
    collector.add(
        batch(
            [
                [packed(0), IGNORE_INDEX, IGNORE_INDEX, IGNORE_INDEX],
                [IGNORE_INDEX, IGNORE_INDEX, packed(2), IGNORE_INDEX],
            ],
            [7, 7],
            [4, 4],
        ),
        logits,
    )
    collector._rows[1] = collector._rows[1]._replace(window=4)
    assert collector.compute_scores(Collectives()).values == {"exact_match": 1.0, "f1": 1.0}


def test_no_rows_give_no_metrics():
    assert PredictionCollector(task("masked_lm")).compute_scores(Collectives()).values == {}


def test_answer_in_the_overlap_of_two_windows_is_correct_in_either():
    collector = PredictionCollector(task("question_answering"))
    logits = np.full((2, 4, 2), -5.0)
    logits[0, 3], logits[1, 1] = 2, 4
    collector.add(
        batch(
            [
                [IGNORE_INDEX, IGNORE_INDEX, IGNORE_INDEX, packed(3)],
                [IGNORE_INDEX, packed(1), IGNORE_INDEX, IGNORE_INDEX],
            ],
            [7, 7],
            [4, 4],
        ),
        logits,
    )
    collector._rows[1] = collector._rows[1]._replace(window=4)
    assert collector.compute_scores(Collectives()).values == {"exact_match": 1.0, "f1": 1.0}
