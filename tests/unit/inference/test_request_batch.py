"""A bad row fails its own request of a batch, with one line; the others get their answers."""

from __future__ import annotations

import json

import jinja2
import pytest

from dist_ft.core.errors import DataError
from dist_ft.inference import request_batch
from dist_ft.inference.request_batch import RequestError, answer_requests, parse_rows


class PanicException(BaseException):
    """As native code raises it."""


def predict(rows):
    """A model that fails on the whole batch if one row is bad, as tokenizers do."""
    predictions = []
    for row in rows:
        text = row.get("text")
        if text is None:
            raise DataError("a row has no text in 'text' (it has \x1b[31mwords). Rename it.")
        if text == "refused":
            raise jinja2.exceptions.TemplateError("only one user\nturn")
        if text == "panic":
            raise PanicException("regex")
        if text == "no memory":
            raise RuntimeError("CUDA out of memory")
        if "pair" in row and not all("pair" in other for other in rows):
            raise AssertionError("rows with and without a second text in one batch")
        predictions.append({"text": text.upper()})  # AttributeError for a number
    return predictions


GOOD = [{"text": "fine"}]
BAD = {
    "no text": ({"words": "x"}, r"a row has no text in 'text' (it has \x1b[31mwords)"),
    "wrong type": ({"text": 5}, "the model cannot read a row (AttributeError: 'int' object"),
    "template": ({"text": "refused"}, "the model cannot read a row (TemplateError: only one user)"),
    "native code": ({"text": "panic"}, "the model cannot read a row (PanicException: regex)"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_row_fails_its_own_request(kind):
    row, message = BAD[kind]
    answers = answer_requests(predict, [GOOD, [row], GOOD * 2, [GOOD[0], row], GOOD])
    assert answers[0] == answers[4] == [{"text": "FINE"}] and answers[2] == [{"text": "FINE"}] * 2
    for answer in (answers[1], answers[3]):
        assert isinstance(answer, RequestError) and str(answer).startswith(message)
        assert str(answer).isprintable()


def test_fault_of_the_model_is_no_fault_of_a_row():
    answers = answer_requests(predict, [GOOD, [{"text": "no memory"}], GOOD])
    assert type(answers[1]) is RuntimeError
    assert answers[0] == answers[2] == [{"text": "FINE"}]


def test_interrupt_is_not_caught():
    def interrupted(rows):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        answer_requests(interrupted, [GOOD])


def test_rows_of_other_columns_are_in_another_batch():
    pairs = [{"text": "a", "pair": "b"}]
    calls = []

    def recorded(rows):
        calls.append(len(rows))
        return predict(rows)

    answers = answer_requests(recorded, [GOOD, pairs, GOOD, pairs])
    assert answers == [[{"text": "FINE"}], [{"text": "A"}], [{"text": "FINE"}], [{"text": "A"}]]
    assert sorted(calls) == [2, 2], "both kinds stay batches"


def test_no_rows_and_no_requests():
    assert answer_requests(predict, []) == []
    assert answer_requests(predict, [[], GOOD]) == [[], [{"text": "FINE"}]]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"text": "x"}', "must be a JSON list of rows"),
        (b'["x"]', "must be a JSON list of rows"),
        (b'[{"text": "ok"}, {"text": "a\\ud800b"}]', "row 2: 'text' has half a character (U+D800)"),
        (b'[{"a": {"b": ["\\udfff"]}}]', "row 1: 'a' has half a character (U+DFFF)"),
        (b'[{"\\udfff": 1}]', "has half a character (U+DFFF)"),
        (json.dumps([{"text": "x" * 2_000_000}]).encode(), "at most 1,000,000 are allowed"),
        (json.dumps([{}] * 2000).encode(), "2000 rows: a request may have at most 1024"),
    ],
)
def test_body_that_no_model_can_read_is_one_line(body, message):
    with pytest.raises(RequestError) as caught:
        parse_rows(body)
    assert message in str(caught.value) and str(caught.value).isprintable()


def test_whole_characters_are_read():
    rows = [{"text": "𝄞 é \u0000", "n": 1}]
    assert parse_rows(json.dumps(rows).encode()) == rows
    assert request_batch.find_row_problem({"tokens": ["a", "𝄞"]}) is None
