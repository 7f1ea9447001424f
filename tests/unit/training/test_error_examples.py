"""The most confident errors of an evaluation: which, in what order, and how they are told."""

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
    wanted = np.array([row + [IGNORE_INDEX] * (size - len(row)) for row in labels])
    return Batch(padded, wanted, np.zeros_like(padded), segments, 0)


def found(scorer: PredictionCollector, collectives: Collectives | None = None):
    collectives = collectives or Collectives()
    scorer.scores(collectives)
    return scorer.examples(collectives, Words())


def test_the_surest_error_comes_first_and_what_is_right_never():
    scorer = PredictionCollector(task("sequence_classification", "x", "y"))
    scorer.add(
        batch([[1, 2], [3, 4], [5]], [[0, IGNORE_INDEX], [0, IGNORE_INDEX], [1]], [7, 3, 9]),
        np.array([[0.0, 1.0], [0.0, 4.0], [-9.0, 9.0]]),
    )
    first, second = found(scorer)
    assert (first["sample"], first["wanted"], first["told"], first["text"]) == (3, "x", "y", "d e")
    assert first["score"] == pytest.approx(1 / (1 + np.exp(-4.0)), abs=1e-6) and first["ids"] == [
        3,
        4,
    ]
    assert second["sample"] == 7 and second["at"] == [1]


def test_there_are_at_most_so_many():
    scorer = PredictionCollector(task("regression"))
    bits = int(np.float32(1).view(np.int32))
    scorer.add(batch([[1]] * 30, [[bits]] * 30, list(range(30))), np.arange(30.0))
    told = found(scorer)
    assert (
        len(told) == error_examples.MOST
        and told[0]["sample"] == 29
        and told[0]["told"] == "29"
        and told[0]["wanted"] == "1"
    )


def test_sets_of_labels_tell_what_is_missing_and_what_is_too_much():
    scorer = PredictionCollector(task("multi_label", "x", "y", "z"))
    scorer.add(batch([[1, 2]], [[0b011, IGNORE_INDEX]], [4]), np.array([[5.0, -3.0, -5.0]]))
    (only,) = found(scorer)
    assert (only["wanted"], only["told"], only["at"]) == ("x, y", "x", [1])


def test_wrong_tags_are_told_with_their_words():
    scorer = PredictionCollector(task("token_classification", "O", "B-x"))
    logits = np.zeros((1, 4, 2))
    logits[0, 1, 1], logits[0, 3, 0] = 5, 2  # the first word is taken for an x, the second for none
    scorer.add(batch([[9, 1, 2, 3]], [[IGNORE_INDEX, 0, IGNORE_INDEX, 1]], [2]), logits)
    (only,) = found(scorer)
    assert (
        only["wanted"] == "b c: O; d: B-x"
        and only["told"] == "b c: B-x; d: O"
        and only["at"] == [[1, 1], [3, 0]]
    )
    assert only["score"] == pytest.approx(1 / (1 + np.exp(-5)), abs=1e-6)


def test_an_answer_of_another_window_is_told_with_its_own_tokens():
    scorer = PredictionCollector(task("question_answering"))
    told = np.full((2, 4, 2), -9.0)
    told[0, 0], told[1, 0] = 0, 0
    told[1, 2, 0], told[1, 3, 1] = 6, 6
    labels = [[IGNORE_INDEX, 1, IGNORE_INDEX, IGNORE_INDEX], [0, IGNORE_INDEX, IGNORE_INDEX, IGNORE_INDEX]]
    scorer.add(batch([[0, 1, 2, 3], [0, 5, 6, 7]], labels, [8, 8], [0, 4]), told)
    (only,) = found(scorer)
    assert (only["wanted"], only["told"], only["window"], only["at"]) == ("b", "g h", 4, [2, 3])
    assert only["score"] == pytest.approx(12)


def test_workers_tell_the_same_of_what_either_saw():
    section = task("sequence_classification", "x", "y")
    whole, mine, theirs = PredictionCollector(section), PredictionCollector(section), PredictionCollector(section)
    for scorers, ids, sample, logits in (
        ((whole, mine), [1, 2], 0, [0.0, 3.0]),
        ((whole, theirs), [3], 1, [0.0, 2.0]),
    ):
        for scorer in scorers:
            scorer.add(
                batch([ids], [[0] + [IGNORE_INDEX] * (len(ids) - 1)], [sample]), np.array([logits])
            )

    class Two(Collectives):
        def all_gather(self, value):
            return [value, theirs._rows if isinstance(value, list) else theirs._seen]

    assert found(mine, Two()) == found(whole)


def test_numbers_that_are_none_are_no_examples():
    scorer = PredictionCollector(task("sequence_classification", "x", "y"))
    scorer.add(batch([[1]], [[1]], [0]), np.array([[np.nan, np.nan]]))
    assert found(scorer) == []
