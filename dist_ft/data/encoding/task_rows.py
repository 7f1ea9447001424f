"""What a task reads from a row: its texts, and its label as numbers. Pure; every refusal names shard and row."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from dist_ft.config.schema import TaskSection
from dist_ft.data.sources.discovery import Row, row_error
from dist_ft.data.sources.row_formats import get_column, require_text

MAX_LABELS_SHOWN = 8
OUTSIDE_TAG = "O"


@dataclass(frozen=True)
class Sample:
    """The texts of a row and what the task wants of them.

    Attributes:
        first: text, or a list of words.
        second: the text that comes with it, or None.
        label: sequence_classification: number of the label; regression: bits of a float32; multi_label: numbers;
            token_classification: a number each word; question_answering: (first character, character after the last)
            of the answer, or None; others: None.
    """

    first: Any
    second: str | None = None
    label: Any = None


RowReader = Callable[[Row, TaskSection, Mapping[str, int], str, int], Sample]


def read_classification(
    row: Row, task: TaskSection, ids: Mapping[str, int], url: str, number: int
) -> Sample:
    """Read a text (or a pair) and its label."""
    value = _get(row, task.columns.label, "label", url, number)
    return Sample(*_texts(row, task, url, number), _id(value, ids, task.columns.label, url, number))


def read_multi_label(
    row: Row, task: TaskSection, ids: Mapping[str, int], url: str, number: int
) -> Sample:
    """Read a text (or a pair) and its labels."""
    column = task.columns.label
    values = _list(_get(row, column, "label", url, number), column, "labels", url, number)
    return Sample(
        *_texts(row, task, url, number), [_id(value, ids, column, url, number) for value in values]
    )


def read_regression(
    row: Row, task: TaskSection, ids: Mapping[str, int], url: str, number: int
) -> Sample:
    """Read a text (or a pair) and a number."""
    column = task.columns.label
    value = _get(row, column, "label", url, number)
    try:
        label = float(value)
    except (TypeError, ValueError):
        label = math.nan
    if not math.isfinite(label) or isinstance(value, bool):
        raise row_error(
            url,
            number,
            f"{column} is {value!r}; a finite number is needed; repair or remove the row",
        )
    return Sample(*_texts(row, task, url, number), int(np.float32(label).view(np.int32)))


def read_token_classification(
    row: Row, task: TaskSection, ids: Mapping[str, int], url: str, number: int
) -> Sample:
    """Read words and their tags."""
    names = task.columns
    words = _list(
        _get(row, names.tokens, "tokens", url, number), names.tokens, "words", url, number
    )
    tags = _list(_get(row, names.tags, "tags", url, number), names.tags, "tags", url, number)
    if not words:
        raise row_error(
            url, number, f"{names.tokens} is empty; at least one word is needed; remove the row"
        )
    if len(words) != len(tags):
        raise row_error(
            url,
            number,
            f"has {len(words)} words in {names.tokens} and {len(tags)} tags in {names.tags}; "
            "one tag a word is needed; repair the row",
        )
    found = [str(tag) for tag in tags]
    broken = next(iter(find_broken_bio(found)), None) if is_bio(ids) else None
    if broken is not None:
        raise row_error(
            url,
            number,
            f"tag {broken + 1} of {names.tags} is {found[broken]} after "
            f"{found[broken - 1] if broken else 'nothing'}; I- goes on with what B- of the "
            "same kind began (BIO); repair the row",
        )
    return Sample(
        [_text(word, names.tokens, url, number) for word in words],
        None,
        [_id(tag, ids, names.tags, url, number) for tag in found],
    )


def is_bio(labels: Iterable[str]) -> bool:
    """Tell whether tags are B-, I- and O (IOB2), and of no scheme with more or fewer marks."""
    marks = {label[0] for label in labels if label[1:2] == "-"}
    return "B" in marks and marks <= {"B", "I"}


def find_broken_bio(tags: list[str]) -> Iterable[int]:
    """Yield the places of I- tags that go on with nothing."""
    for at, tag in enumerate(tags):
        if tag.startswith("I-") and (
            not at or tags[at - 1] not in (f"B-{tag[2:]}", f"I-{tag[2:]}")
        ):
            yield at


def read_question_answering(
    row: Row, task: TaskSection, ids: Mapping[str, int], url: str, number: int
) -> Sample:
    """Read a question, its context and where the first answer lies in it."""
    names = task.columns
    question, context = (
        _text(_get(row, column, field, url, number), column, url, number)
        for field, column in (("question", names.question), ("context", names.context))
    )
    answers = _get(row, names.answers, "answers", url, number)
    if not isinstance(answers, Mapping) or not {"text", "answer_start"} <= answers.keys():
        raise row_error(
            url,
            number,
            f"{names.answers} is no {{text, answer_start}}; lists of texts and of their first "
            "characters are needed; repair the row",
        )
    texts, starts = (
        _list(answers[name], f"{names.answers}.{name}", "answers", url, number)
        for name in ("text", "answer_start")
    )
    if len(texts) != len(starts):
        raise row_error(
            url,
            number,
            f"{names.answers} has {len(texts)} texts and {len(starts)} places; as many are "
            "needed; repair the row",
        )
    if not texts:
        return Sample(question, context, None)
    text, start = texts[0], starts[0]
    if not text or start < 0 or context[start : start + len(text)] != text:
        raise row_error(
            url,
            number,
            f"the answer {text!r} is not at character {start} of {names.context}; it must be "
            "a part of it; repair the row",
        )
    lead = len(text) - len(text.lstrip())
    return Sample(question, context, (start + lead, start + lead + len(text.strip())))


def read_seq2seq(row: Row, task: TaskSection, ids: Mapping[str, int], url: str, number: int) -> Sample:
    """Read a source and its target."""
    names = task.columns
    source, target = (
        _text(_get(row, column, field, url, number), column, url, number)
        for field, column in (("source", names.source), ("target", names.target))
    )
    return Sample(source, target)


def read_masked_lm(row: Row, task: TaskSection, ids: Mapping[str, int], url: str, number: int) -> Sample:
    """Read a text."""
    return Sample(
        _text(_get(row, task.columns.text, "text", url, number), task.columns.text, url, number)
    )


def read_embedding(row: Row, task: TaskSection, ids: Mapping[str, int], url: str, number: int) -> Sample:
    """Read two texts that belong together."""
    pair = task.columns.pair or "positive"
    return Sample(
        *(
            _text(_get(row, column, field, url, number), column, url, number)
            for field, column in (("text", task.columns.text), ("pair", pair))
        )
    )


READERS: dict[str, RowReader] = {
    "sequence_classification": read_classification,
    "multi_label": read_multi_label,
    "regression": read_regression,
    "token_classification": read_token_classification,
    "question_answering": read_question_answering,
    "seq2seq": read_seq2seq,
    "masked_lm": read_masked_lm,
    "embedding": read_embedding,
}
"""How each task reads a row."""


def read_label_names(row: Row, task: TaskSection, url: str, number: int) -> list[str]:
    """Return the names of the labels in a row, of a task that chooses among labels."""
    if task.name == "token_classification":
        column, field = task.columns.tags, "tags"
    else:
        column, field = task.columns.label, "label"
    value = _get(row, column, field, url, number)
    values = (
        [value]
        if task.name == "sequence_classification"
        else _list(value, column, "labels", url, number)
    )
    return [str(item) for item in values if item is not None]


def sort_labels(labels: Iterable[str]) -> tuple[str, ...]:
    """Return labels in the order a head has them: numbers by value, O first, then by name, I- after its B-."""
    found = set(labels)
    if all(re.fullmatch(r"-?[0-9]+", label) for label in found):
        return tuple(sorted(found, key=int))

    def place(label: str) -> tuple[bool, str, str]:
        prefix, _, kind = label.partition("-") if label[1:2] == "-" else ("", "", label)
        return label != OUTSIDE_TAG, kind, prefix

    return tuple(sorted(found, key=place))


def _texts(row: Row, task: TaskSection, url: str, number: int) -> tuple[str, str | None]:
    names = task.columns
    first = _text(_get(row, names.text, "text", url, number), names.text, url, number)
    if names.pair is None:
        return first, None
    return first, _text(_get(row, names.pair, "pair", url, number), names.pair, url, number)


def _id(value: Any, ids: Mapping[str, int], column: str, url: str, number: int) -> int:
    if value is None or str(value) not in ids:
        known = ", ".join(list(ids)[:MAX_LABELS_SHOWN]) + (", ..." if len(ids) > MAX_LABELS_SHOWN else "")
        raise row_error(
            url,
            number,
            f"{column} is {value!r}; there are {known}; repair the row, or name all labels in "
            "task.labels of a new run",
        )
    return ids[str(value)]


def _list(value: Any, column: str, what: str, url: str, number: int) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise row_error(
            url,
            number,
            f"{column} is a {type(value).__name__}; a list of {what} is needed; convert it, "
            "or remove the row",
        )
    return list(value)


def _get(row: Row, column: str, field: str, url: str, number: int) -> Any:
    return get_column(row, column, f"task.columns.{field}", url, number)


def _text(value: Any, where: str, url: str, number: int) -> str:
    if not require_text(value, where, url, number).strip():
        raise row_error(
            url, number, f"{where} is empty; text is needed; convert it or remove the row"
        )
    return str(value)
