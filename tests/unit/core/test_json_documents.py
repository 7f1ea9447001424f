"""JSON of others: bounded, and one reason for every failure."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import pytest

from dist_ft.core.errors import DocumentError, StorageError
from dist_ft.core.json_documents import (
    MAX_DEPTH,
    decode_json,
    encode_json,
    interpreting,
    nested_deeper,
    parse_json,
    parse_json_object,
)


def nested(depth: int, opening: str = "[", closing: str = "]") -> str:
    return opening * depth + closing * depth


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b'{"a": ', "is not valid JSON .Expecting value at column"),
        (b"\xff\xfe\x00", "is not valid JSON"),
        (b'{"a": "\xc3"}', "byte 7 is not UTF-8"),
        (b"\x80\x04\x95pickle", "not valid JSON"),
        (nested(100_000).encode(), "nested more than 100 deep"),
        (nested(100_000, '{"a":', "}").encode(), "nested more than 100 deep"),
        (b"[" * 1_000_000, "nested more than 100 deep"),
        (b'{"a": ' + b"9" * 5000 + b"}", "a number of thousands of digits"),
        (b'{"a": 1, "a": 2}', "duplicate key 'a'"),
        (b'{"x": {"\\u001b[31m": 1, "\\u001b[31m": 2}}', r"duplicate key '\\+x1b\[31m'"),
        (b"[1]", "is a list. It must be a JSON object"),
        (b"null", "is a NoneType. It must be a JSON object"),
    ],
)
def test_what_is_no_object_is_one_line(content: bytes, reason: str) -> None:
    with pytest.raises(DocumentError, match=reason) as caught:
        parse_json_object(content, "run/file.json")

    text = str(caught.value)
    assert text.startswith("run/file.json: ")
    assert text.endswith("Restore the file from a copy, or remove it.")
    assert "\n" not in text and len(text) < 500


def test_an_error_of_a_document_is_a_value_error() -> None:
    # Readers that take a damaged file for an absent one catch those.
    with pytest.raises(ValueError):
        parse_json(b"", "name")


def test_what_json_holds_is_read() -> None:
    value = {"a": [1, 2.5, None, True, "b[[[{{{"], 'quote"[': {"\\": "]"}}
    assert parse_json_object(json.dumps(value).encode(), "name") == value
    assert decode_json(json.dumps(value)) == value


def random_value(numbers: Any, depth: int) -> Any:
    texts = ["", '"', "\\", '\\"', "[", "]]", "{", '}"', "\\\\", "\u2028", "a"]
    kind = numbers.randrange(5 if depth else 3)
    if kind < 3:
        return "".join(numbers.choices(texts, k=numbers.randrange(6)))
    if kind == 3:
        return [random_value(numbers, depth - 1) for _ in range(numbers.randrange(3))]
    return {str(key): random_value(numbers, depth - 1) for key in range(numbers.randrange(3))}


def depth_of(value: Any) -> int:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return 1 + max(map(depth_of, value), default=0)
    return 0


def test_depth_is_that_of_lists_and_not_of_brackets_in_texts() -> None:
    import random

    numbers = random.Random(0)
    for _ in range(500):
        # Many brackets, so that the count alone never decides.
        value = [random_value(numbers, 8), *[[]] * 40]
        text = json.dumps(value, ensure_ascii=bool(numbers.randrange(2)))
        depth = depth_of(value)
        assert not nested_deeper(text, depth)
        assert nested_deeper(text, depth - 1)


def test_depth_is_allowed_up_to_the_limit() -> None:
    assert decode_json(nested(MAX_DEPTH))
    with pytest.raises(ValueError, match="nested more than"):
        decode_json(nested(MAX_DEPTH + 1))


def test_depth_costs_little() -> None:
    content = (b'[{"a": ["' + b"[" * 100 + b'\\""]}],') * 100_000
    started = time.monotonic()
    assert not nested_deeper(content, MAX_DEPTH)
    assert time.monotonic() - started < 5


def test_a_deep_stack_is_no_traceback() -> None:
    def recurse(depth: int) -> Any:
        if depth:
            return recurse(depth - 1)
        return parse_json(nested(MAX_DEPTH - 1), "name")

    frame, depth = sys._getframe(), 0
    while frame is not None:
        frame, depth = frame.f_back, depth + 1  # type: ignore[assignment]
    with pytest.raises((DocumentError, RecursionError)):
        recurse(sys.getrecursionlimit() - depth - 20)


@pytest.mark.parametrize("value", ["a\ud800b", {"\udcff": 1}, ["ok", {"k": "\ud83d"}]])
def test_a_lone_surrogate_survives_as_an_escape(value: Any) -> None:
    assert json.loads(encode_json(value)) == value


def test_text_is_written_readably() -> None:
    assert encode_json({"a": "é"}) == '{"a": "é"}'.encode()


@pytest.mark.parametrize(
    "use",
    [
        lambda value: value["absent"],
        lambda value: value["a"]["b"],
        lambda value: value["a"].items(),
        lambda value: int(value["text"]),
        lambda value: int(float("inf")),
        lambda value: [][0],
    ],
)
def test_a_form_that_does_not_fit_is_one_line(use: Any) -> None:
    expected = r"^name: does not have the form that dist_ft writes"
    with pytest.raises(DocumentError, match=expected), interpreting("name"):
        use({"a": 1, "text": "x"})


def test_errors_of_dist_ft_are_not_hidden() -> None:
    with pytest.raises(StorageError, match="down"), interpreting("name"):
        raise StorageError("down")
