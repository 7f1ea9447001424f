"""Columns to texts and labels; whatever can not be used is named by shard and row."""

from __future__ import annotations

import numpy as np
import pytest

from dist_ft.config.schema import TaskSection
from dist_ft.core.errors import DataError
from dist_ft.data.encoding.task_rows import READERS, read_label_names, sort_labels

URL, LABELS = "s3://b/x.jsonl", ("O", "B-PER", "I-PER", "B-ORG")


def task(name: str, **values) -> TaskSection:
    return TaskSection.model_validate({"name": name, **values})


def read(name: str, row, labels=("no", "yes"), **values):
    section = task(name, **values)
    return READERS[name](row, section, {label: i for i, label in enumerate(labels)}, URL, 7)


def refused(*args, **values) -> str:
    with pytest.raises(DataError) as caught:
        read(*args, **values)
    return str(caught.value).removeprefix(f"{URL} row 7: ")


def test_single_texts_and_pairs_have_one_label():
    assert read("sequence_classification", {"text": "fine", "label": "yes"}).label == 1
    found = read(
        "sequence_classification",
        {"a": "x", "b": "y", "c": 1},
        ("0", "1"),
        columns={"text": "a", "pair": "b", "label": "c"},
    )
    assert (found.first, found.second, found.label) == ("x", "y", 1)
    assert read("multi_label", {"text": "fine", "label": ["yes", "no"]}).label == [1, 0]
    assert read("multi_label", {"text": "fine", "label": []}).label == []


def test_a_label_the_head_does_not_know_is_refused():
    assert refused("sequence_classification", {"text": "x", "label": "perhaps"}) == (
        "label is 'perhaps'; there are no, yes; repair the row, or name all labels in task.labels of a new run"
    )
    assert refused("sequence_classification", {"text": "x", "label": None}).startswith(
        "label is None; there are no, yes; "
    )
    assert refused("multi_label", {"text": "x", "label": "yes"}).startswith(
        "label is a str; a list of labels is needed; "
    )


def test_a_missing_column_is_named_with_those_there_are():
    assert refused("sequence_classification", {"text": "x", "stars": 3}) == (
        "has no column 'label'; there are text, stars; set task.columns.label to the right one or repair the row"
    )
    assert (
        refused("masked_lm", {"text": " "})
        == "text is empty; text is needed; convert it or remove the row"
    )


@pytest.mark.parametrize("value", [3, 2.5, "-1.25"])
def test_a_number_keeps_its_bits(value):
    bits = read("regression", {"text": "x", "label": value}).label
    assert np.int32(bits).view(np.float32) == np.float32(value)


@pytest.mark.parametrize("value", ["good", float("nan"), float("inf"), None, True])
def test_what_is_no_finite_number_is_refused(value):
    assert "a finite number is needed" in refused("regression", {"text": "x", "label": value})


def test_words_have_a_tag_each():
    found = read(
        "token_classification",
        {"tokens": ["Ada", "Lovelace", "wrote"], "tags": ["B-PER", "I-PER", "O"]},
        LABELS,
    )
    assert (found.first, found.label) == (["Ada", "Lovelace", "wrote"], [1, 2, 0])
    assert "has 2 words in tokens and 1 tags in tags" in refused(
        "token_classification", {"tokens": ["a", "b"], "tags": ["O"]}, LABELS
    )


@pytest.mark.parametrize(
    ("tags", "where"),
    [
        (["O", "I-PER"], "tag 2 of tags is I-PER after O"),
        (["I-PER", "O"], "tag 1 of tags is I-PER after nothing"),
        (["B-ORG", "I-PER"], "tag 2 of tags is I-PER after B-ORG"),
    ],
)
def test_tags_that_break_bio_are_refused(tags, where):
    assert refused("token_classification", {"tokens": ["a", "b"], "tags": tags}, LABELS).startswith(
        where
    )


def test_other_schemes_of_tags_are_not_judged():
    for labels in (("O", "I-PER"), ("O", "B-PER", "I-PER", "E-PER", "S-PER"), ("NN", "VB")):
        read("token_classification", {"tokens": ["a"], "tags": [labels[1]]}, labels)


def test_an_answer_must_lie_in_its_context():
    row = {
        "question": "who?",
        "context": "it was Ada ",
        "answers": {"text": ["Ada "], "answer_start": [7]},
    }
    assert read("question_answering", row).label == (7, 10), "blanks at its ends are no part of it"
    assert (
        read("question_answering", {**row, "answers": {"text": [], "answer_start": []}}).label
        is None
    )
    assert refused(
        "question_answering", {**row, "answers": {"text": ["Ada"], "answer_start": [6]}}
    ) == (
        "the answer 'Ada' is not at character 6 of context; it must be a part of it; repair the row"
    )
    assert "is no {text, answer_start}" in refused("question_answering", {**row, "answers": "Ada"})


def test_labels_are_found_and_ordered():
    assert read_label_names({"label": 3}, task("sequence_classification"), URL, 1) == ["3"]
    assert read_label_names({"tags": ["O", "B-X"]}, task("token_classification"), URL, 1) == ["O", "B-X"]
    assert sort_labels(["10", "9", "-1"]) == ("-1", "9", "10")
    assert sort_labels(["I-PER", "B-ORG", "O", "B-PER"]) == ("O", "B-ORG", "B-PER", "I-PER")
    assert sort_labels({"yes", "no"}) == ("no", "yes")
