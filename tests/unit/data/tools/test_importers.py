"""Well-known formats to rows."""

from __future__ import annotations

import json

import pytest

from dist_ft.core.errors import DataError, StorageError
from dist_ft.data.tools.importers import conll, labelled, pairs, parallel, squad


@pytest.fixture
def file(tmp_path):
    def make(text: str, name: str = "x", encoding: str = "utf-8") -> str:
        (tmp_path / name).write_bytes(text.encode(encoding))
        return str(tmp_path / name)

    return make


def test_tagged_words(file):
    path = file("-DOCSTART- -X- O\n\nAda NNP B-PER\nwrote VB O\n\n\nthe DT O")
    assert list(conll([path])) == [
        {"tokens": ["Ada", "wrote"], "tags": ["B-PER", "O"]},
        {"tokens": ["the"], "tags": ["O"]},
    ]
    told = file("# newdoc\n# text = Ada wrote\nAda NNP B-PER\n# = O\n\n# O\nthe DT O")
    assert [row["tokens"] for row in conll([told])] == [["Ada", "#"], ["#", "the"]]
    assert list(conll([file("a b\tO\r\n\r\n")])) == [{"tokens": ["a b"], "tags": ["O"]}]
    with pytest.raises(DataError, match="x line 2: has one column"):
        list(conll([file("a O\nb\n")]))


def test_squad(file):
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
    first, second = squad([path])
    assert first == {
        "id": "1",
        "title": "T",
        "question": "who?",
        "context": "it was Ada",
        "answers": {"text": ["Ada"], "answer_start": [7]},
    }
    assert second["answers"] == {"text": [], "answer_start": []}
    with pytest.raises(DataError, match="is not in SQuAD's format"):
        list(squad([file("{}")]))


def test_labelled_files_and_their_encoding(file):
    good = file("très bon\n\nfine\n", "good", "latin-1")
    assert list(labelled([f"{good}=yes"], "latin-1")) == [
        {"text": "très bon", "label": "yes"},
        {"text": "fine", "label": "yes"},
    ]
    with pytest.raises(DataError, match="--encoding=utf-8 can not read it"):
        list(labelled([f"{good}=yes"]))
    with pytest.raises(DataError, match="has no label; PATH=LABEL is needed"):
        list(labelled([good]))


def test_parallel_files(file):
    assert list(parallel([file("a\nb", "s"), file("c\nd\n", "t")])) == [
        {"source": "a", "target": "c"},
        {"source": "b", "target": "d"},
    ]
    with pytest.raises(DataError, match=r"has 2 lines and .* 1; as many are needed"):
        list(parallel([file("a\nb", "s"), file("c", "t")]))
    with pytest.raises(DataError, match="1 files; two are needed"):
        list(parallel([file("a")]))


def test_pairs(file):
    path = file(json.dumps({"train": [["hi", "greet"]], "val": []}))
    assert list(pairs([path], part="train")) == [{"text": "hi", "label": "greet"}]
    assert list(pairs([file(json.dumps([["hi", 1]]))])) == [{"text": "hi", "label": 1}]
    with pytest.raises(DataError, match="--part=test: there are train, val; name one"):
        list(pairs([file(json.dumps({"train": [], "val": []}))], part="test"))


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(StorageError, match="there is no such file"):
        list(conll([str(tmp_path / "nothing")]))
