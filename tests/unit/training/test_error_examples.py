"""The most confident errors of an evaluation: which rows, their order, their description."""

from __future__ import annotations

import numpy as np
import pytest

from dist_ft.config.schema import TaskSection
from dist_ft.core.world import Collectives
from dist_ft.data.batch import IGNORE_INDEX, Batch
from dist_ft.training import error_examples
from dist_ft.training.prediction_collector import PredictionCollector


class Words:
    """Decodes token ids as letters."""

    def decode(self, ids, skip_special_tokens=False):
        return " ".join("abcdefghij"[token] for token in ids)


def task(name: str, *labels: str) -> TaskSection:
    return TaskSection.model_validate({"name": name, "labels": labels})


def batch(
    ids: list[list[int]],
    labels: list[list[int]],
    samples: list[int],
    firsts: list[int] | None = None,
) -> Batch:
    size = max(map(len, ids))
    segments = np.array(
        [
            [sample, first, len(row), 0]
            for sample, first, row in zip(samples, firsts or [0] * len(ids), ids, strict=True)
        ]
    )
    padded = np.array([row + [0] * (size - len(row)) for row in ids])
    padded_labels = np.array([row + [IGNORE_INDEX] * (size - len(row)) for row in labels])
    return Batch(padded, padded_labels, np.zeros_like(padded), segments, 0)


def examples_of(collector: PredictionCollector, collectives: Collectives | None = None):
    collectives = collectives or Collectives()
    collector.compute_scores(collectives)
    return collector.collect_error_examples(collectives, Words())


def test_most_confident_error_comes_first_and_correct_rows_are_left_out():
    collector = PredictionCollector(task("sequence_classification", "x", "y"))
    collector.add(
        batch([[1, 2], [3, 4], [5]], [[0, IGNORE_INDEX], [0, IGNORE_INDEX], [1]], [7, 3, 9]),
        np.array([[0.0, 1.0], [0.0, 4.0], [-9.0, 9.0]]),
    )
    first, second = examples_of(collector)
    assert (first["sample"], first["expected"], first["predicted"], first["text"]) == (
        3,
        "x",
        "y",
        "d e",
    )
    assert first["score"] == pytest.approx(1 / (1 + np.exp(-4.0)), abs=1e-6) and first["ids"] == [
        3,
        4,
    ]
    assert second["sample"] == 7 and second["at"] == [1]


def test_number_of_examples_is_limited():
    collector = PredictionCollector(task("regression"))
    bits = int(np.float32(1).view(np.int32))
    collector.add(batch([[1]] * 30, [[bits]] * 30, list(range(30))), np.arange(30.0))
    examples = examples_of(collector)
    assert (
        len(examples) == error_examples.MAX_EXAMPLES
        and examples[0]["sample"] == 29
        and examples[0]["predicted"] == "29"
        and examples[0]["expected"] == "1"
    )


def test_label_sets_list_missing_and_extra_labels():
    collector = PredictionCollector(task("multi_label", "x", "y", "z"))
    collector.add(batch([[1, 2]], [[0b011, IGNORE_INDEX]], [4]), np.array([[5.0, -3.0, -5.0]]))
    (only,) = examples_of(collector)
    assert (only["expected"], only["predicted"], only["at"]) == ("x, y", "x", [1])


def test_wrong_tags_are_listed_with_their_words():
    collector = PredictionCollector(task("token_classification", "O", "B-x"))
    logits = np.zeros((1, 4, 2))
    logits[0, 1, 1], logits[0, 3, 0] = 5, 2  # the first word is taken for an x, the second for none
    collector.add(batch([[9, 1, 2, 3]], [[IGNORE_INDEX, 0, IGNORE_INDEX, 1]], [2]), logits)
    (only,) = examples_of(collector)
    assert (
        only["expected"] == "b c: O; d: B-x"
        and only["predicted"] == "b c: B-x; d: O"
        and only["at"] == [[1, 1], [3, 0]]
    )
    assert only["score"] == pytest.approx(1 / (1 + np.exp(-5)), abs=1e-6)


def test_answer_in_another_window_is_decoded_from_that_window():
    collector = PredictionCollector(task("question_answering"))
    logits = np.full((2, 4, 2), -9.0)
    logits[0, 0], logits[1, 0] = 0, 0
    logits[1, 2, 0], logits[1, 3, 1] = 6, 6
    labels = [
        [IGNORE_INDEX, 1, IGNORE_INDEX, IGNORE_INDEX],
        [0, IGNORE_INDEX, IGNORE_INDEX, IGNORE_INDEX],
    ]
    collector.add(batch([[0, 1, 2, 3], [0, 5, 6, 7]], labels, [8, 8], [0, 4]), logits)
    (only,) = examples_of(collector)
    assert (only["expected"], only["predicted"], only["window"], only["at"]) == (
        "b",
        "g h",
        4,
        [2, 3],
    )
    assert only["score"] == pytest.approx(12)


def test_workers_return_the_same_examples_whichever_saw_them():
    section = task("sequence_classification", "x", "y")
    whole, mine, theirs = (
        PredictionCollector(section),
        PredictionCollector(section),
        PredictionCollector(section),
    )
    for collectors, ids, sample, logits in (
        ((whole, mine), [1, 2], 0, [0.0, 3.0]),
        ((whole, theirs), [3], 1, [0.0, 2.0]),
    ):
        for collector in collectors:
            collector.add(
                batch([ids], [[0] + [IGNORE_INDEX] * (len(ids) - 1)], [sample]), np.array([logits])
            )

    class Two(Collectives):
        def all_gather(self, value):
            return [value, theirs._rows if isinstance(value, list) else theirs._windows]

    assert examples_of(mine, Two()) == examples_of(whole)


def test_rows_with_nan_are_not_examples():
    collector = PredictionCollector(task("sequence_classification", "x", "y"))
    collector.add(batch([[1]], [[1]], [0]), np.array([[np.nan, np.nan]]))
    assert examples_of(collector) == []
