"""Well-known formats are imported as rows."""

from __future__ import annotations

import json

import pytest

from dist_ft.core.errors import DataError, StorageError
from dist_ft.data.tools.importers import (
    read_conll,
    read_labeled,
    read_pairs,
    read_parallel,
    read_squad,
)


@pytest.fixture
def file(tmp_path):
    def make(text: str, name: str = "x", encoding: str = "utf-8") -> str:
        (tmp_path / name).write_bytes(text.encode(encoding))
        return str(tmp_path / name)

    return make


def test_conll_is_read_as_tagged_words(file):
    path = file("-DOCSTART- -X- O\n\nAda NNP B-PER\nwrote VB O\n\n\nthe DT O")
    assert list(read_conll([path])) == [
        {"tokens": ["Ada", "wrote"], "tags": ["B-PER", "O"]},
        {"tokens": ["the"], "tags": ["O"]},
    ]
    path = file("# newdoc\n# text = Ada wrote\nAda NNP B-PER\n# = O\n\n# O\nthe DT O")
    assert [row["tokens"] for row in read_conll([path])] == [["Ada", "#"], ["#", "the"]]
    assert list(read_conll([file("a b\tO\r\n\r\n")])) == [{"tokens": ["a b"], "tags": ["O"]}]
    with pytest.raises(DataError, match="x line 2: has one column"):
        list(read_conll([file("a O\nb\n")]))


def test_squad_is_read_with_its_answers(file):
    path = file(
        json.dumps(
            {
                "data": [
                    {
                        "title": "T",
                        "paragraphs": [
                            {
                                "context": "it was Ada",
                                "qas": [
                                    {
                                        "id": "1",
                                        "question": "who?",
                                        "answers": [{"text": "Ada", "answer_start": 7}],
                                    },
                                    {
                                        "id": "2",
                                        "question": "why?",
                                        "answers": [],
                                        "is_impossible": True,
                                    },
                                ],
                            }
                        ],
                    }
                ]
            }
        )
    )
    first, second = read_squad([path])
    assert first == {
        "id": "1",
        "title": "T",
        "question": "who?",
        "context": "it was Ada",
        "answers": {"text": ["Ada"], "answer_start": [7]},
    }
    assert second["answers"] == {"text": [], "answer_start": []}
    with pytest.raises(DataError, match="is not in SQuAD's format"):
        list(read_squad([file("{}")]))


def test_labeled_files_are_read_with_their_encoding(file):
    good = file("très bon\n\nfine\n", "good", "latin-1")
    assert list(read_labeled([f"{good}=yes"], "latin-1")) == [
        {"text": "très bon", "label": "yes"},
        {"text": "fine", "label": "yes"},
    ]
    with pytest.raises(DataError, match=r"--encoding=utf-8 cannot decode it"):
        list(read_labeled([f"{good}=yes"]))
    with pytest.raises(DataError, match=r"has no label. It must be PATH=LABEL"):
        list(read_labeled([good]))


def test_parallel_files_are_read_line_by_line(file):
    assert list(read_parallel([file("a\nb", "s"), file("c\nd\n", "t")])) == [
        {"source": "a", "target": "c"},
        {"source": "b", "target": "d"},
    ]
    with pytest.raises(DataError, match=r"has 2 lines but .* has 1. The number must be the same"):
        list(read_parallel([file("a\nb", "s"), file("c", "t")]))
    with pytest.raises(DataError, match=r"1 files. Two are needed"):
        list(read_parallel([file("a")]))


def test_pairs_are_read_from_json(file):
    path = file(json.dumps({"train": [["hi", "greet"]], "val": []}))
    assert list(read_pairs([path], part="train")) == [{"text": "hi", "label": "greet"}]
    assert list(read_pairs([file(json.dumps([["hi", 1]]))])) == [{"text": "hi", "label": 1}]
    with pytest.raises(DataError, match=r"--part=test: unknown part. Choose one of train, val"):
        list(read_pairs([file(json.dumps({"train": [], "val": []}))], part="test"))


def test_missing_file_is_refused(tmp_path):
    with pytest.raises(StorageError, match="This file or bucket does not exist"):
        list(read_conll([str(tmp_path / "nothing")]))
