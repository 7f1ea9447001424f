"""Each task reads columns to texts and labels; errors name shard and row."""

from __future__ import annotations

import numpy as np
import pytest

from dist_ft.config.schema import TaskSection
from dist_ft.core.errors import DataError, ModelError
from dist_ft.data.sources.discovery import RowLocation
from dist_ft.tasks.base import make_task
from dist_ft.tasks.question_answering import QuestionAnswering

URL, LABELS = "s3://b/x.jsonl", ("O", "B-PER", "I-PER", "B-ORG")


def task(name: str, **values) -> TaskSection:
    return TaskSection.model_validate({"name": name, **values})


def read(name: str, row, labels=("no", "yes"), **values):
    return make_task(task(name, labels=labels, **values)).read(row, RowLocation(URL, 7))


def refused(*args, **values) -> str:
    with pytest.raises(DataError) as caught:
        read(*args, **values)
    return str(caught.value).removeprefix(f"{URL} row 7: ")


def test_texts_and_pairs_are_read_with_their_labels():
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


def test_unknown_label_is_refused():
    assert refused("sequence_classification", {"text": "x", "label": "perhaps"}) == (
        "label is 'perhaps'. The labels are no, yes. Repair the row, or name all labels in task.labels of a new run."
    )
    assert refused("sequence_classification", {"text": "x", "label": None}).startswith(
        "label is None. The labels are no, yes. "
    )
    assert refused("multi_label", {"text": "x", "label": "yes"}).startswith(
        "label is a str. It must be a list of labels. "
    )


def test_error_of_missing_column_lists_the_others():
    assert refused("sequence_classification", {"text": "x", "stars": 3}) == (
        "has no column 'label'. Its columns: text, stars. Set task.columns.label to the right one or repair the row."
    )
    assert (
        refused("masked_lm", {"text": " "})
        == "text is empty. It must be text. Convert it or remove the row."
    )


@pytest.mark.parametrize("value", [3, 2.5, "-1.25"])
def test_number_is_stored_as_float32_bits(value):
    bits = read("regression", {"text": "x", "label": value}).label
    assert np.int32(bits).view(np.float32) == np.float32(value)


@pytest.mark.parametrize(
    "value", ["good", float("nan"), float("inf"), None, True, 1e39, 10**400, [1.0]]
)
def test_value_that_is_not_a_finite_number_is_refused(value):
    assert "It must be a finite number" in refused("regression", {"text": "x", "label": value})


def test_each_word_has_one_tag():
    found = read(
        "token_classification",
        {"tokens": ["Ada", "Lovelace", "wrote"], "tags": ["B-PER", "I-PER", "O"]},
        LABELS,
    )
    assert (found.first, found.label) == (["Ada", "Lovelace", "wrote"], [1, 2, 0])
    assert "has 2 words in tokens but 1 tags in tags" in refused(
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


def test_other_tag_schemes_are_not_checked():
    for labels in (("O", "I-PER"), ("O", "B-PER", "I-PER", "E-PER", "S-PER"), ("NN", "VB")):
        read("token_classification", {"tokens": ["a"], "tags": [labels[1]]}, labels)


def test_answer_must_be_in_its_context():
    row = {
        "question": "who?",
        "context": "it was Ada ",
        "answers": {"text": ["Ada "], "answer_start": [7]},
    }
    assert read("question_answering", row).label == (7, 10), "blanks at its ends are not part of it"
    assert (
        read("question_answering", {**row, "answers": {"text": [], "answer_start": []}}).label
        is None
    )
    assert refused(
        "question_answering", {**row, "answers": {"text": ["Ada"], "answer_start": [6]}}
    ) == (
        "the answer 'Ada' is not at character 6 of context. It must be a part of the context. Repair the row."
    )
    assert "is not {text, answer_start}" in refused("question_answering", {**row, "answers": "Ada"})


@pytest.mark.parametrize(
    ("text", "start", "problem"),
    [
        (5, 7, "answers.text[0] is a int. It must be text"),
        (None, 7, "answers.text[0] is a NoneType. It must be text"),
        ("  ", 7, "answers.text[0] is empty. It must be text"),
        ("Ada", "7", "answers.answer_start[0] is a str. It must be a whole number"),
        ("Ada", 7.0, "answers.answer_start[0] is a float. It must be a whole number"),
        ("Ada", None, "answers.answer_start[0] is a NoneType. It must be a whole number"),
        ("t", True, "answers.answer_start[0] is a bool. It must be a whole number"),
    ],
)
def test_answers_of_other_types_are_refused_by_name(text, start, problem):
    answers = {"text": [text], "answer_start": [start]}
    row = {"question": "who?", "context": "it was Ada", "answers": answers}
    assert refused("question_answering", row).startswith(problem)


def test_labels_are_collected():
    def names(name: str, row) -> list[str]:
        return make_task(task(name)).read_label_names(row, RowLocation(URL, 1))

    assert names("sequence_classification", {"label": 3}) == ["3"]
    assert names("sequence_classification", {"label": None}) == []
    assert names("multi_label", {"label": ["a", None, "b"]}) == ["a", "b"]
    assert names("token_classification", {"tags": ["O", "B-X"]}) == ["O", "B-X"]


def test_stored_tokens_depend_on_the_version_of_every_task():
    class OwnAnswers(QuestionAnswering):
        version = 2

    section = task("question_answering")
    assert QuestionAnswering(section).recipe() == {"labels": "spans"}
    assert OwnAnswers(section).recipe() == {"labels": "spans", "version": 2}
    assert make_task(task("embedding")).recipe() == {}


def test_a_task_without_predictions_says_so():
    with pytest.raises(ModelError, match=r"task\.name=masked_lm: the task does not say how"):
        make_task(task("masked_lm")).predict(None, [])
