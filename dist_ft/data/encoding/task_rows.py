"""Read what a task needs from a row: its texts, and its label as numbers.

Pure functions. Every error names shard and row.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from dist_ft.config.schema import TaskSection
from dist_ft.data.sources.discovery import Row, RowLocation
from dist_ft.data.sources.row_formats import get_column, require_text

MAX_LABELS_SHOWN = 8
"""Labels listed in an error message."""
OUTSIDE_TAG = "O"


class TextPair(NamedTuple):
    """The text of a row, and the second text of a pair or None."""

    first: str
    second: str | None


@dataclass(frozen=True)
class Sample:
    """The texts of a row and its label.

    Attributes:
        first: text, or a list of words.
        second: the second text, or None.
        label: sequence_classification: number of the label; regression: bits of a float32;
            multi_label: numbers of the labels; token_classification: number of each word's tag;
            question_answering: (first character, character after the last) of the answer, or None;
            other tasks: None.
    """

    first: Any
    second: str | None = None
    label: Any = None


RowReader = Callable[[Row, TaskSection, Mapping[str, int], RowLocation], Sample]
"""Reads a row, given the number of each label."""


def read_classification(
    row: Row, task: TaskSection, label_ids: Mapping[str, int], location: RowLocation
) -> Sample:
    """Read a text (or a pair) and its label."""
    value = _get(row, task.columns.label, "label", location)
    texts = _read_texts(row, task, location)
    return Sample(*texts, _label_id(value, label_ids, task.columns.label, location))


def read_multi_label(
    row: Row, task: TaskSection, label_ids: Mapping[str, int], location: RowLocation
) -> Sample:
    """Read a text (or a pair) and its labels."""
    column = task.columns.label
    values = _require_list(_get(row, column, "label", location), column, "labels", location)
    texts = _read_texts(row, task, location)
    return Sample(*texts, [_label_id(value, label_ids, column, location) for value in values])


def read_regression(
    row: Row, task: TaskSection, label_ids: Mapping[str, int], location: RowLocation
) -> Sample:
    """Read a text (or a pair) and a number."""
    column = task.columns.label
    value = _get(row, column, "label", location)
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan

    if not math.isfinite(number) or isinstance(value, bool):
        raise location.error(
            f"{column} is {value!r}. It must be a finite number. Repair or remove the row."
        )

    bits = int(np.float32(number).view(np.int32))
    return Sample(*_read_texts(row, task, location), bits)


def read_token_classification(
    row: Row, task: TaskSection, label_ids: Mapping[str, int], location: RowLocation
) -> Sample:
    """Read words and their tags."""
    columns = task.columns
    words = _require_list(
        _get(row, columns.tokens, "tokens", location), columns.tokens, "words", location
    )
    values = _require_list(
        _get(row, columns.tags, "tags", location), columns.tags, "tags", location
    )
    if not words:
        raise location.error(
            f"{columns.tokens} is empty. At least one word is needed. Remove the row."
        )

    if len(words) != len(values):
        raise location.error(
            f"has {len(words)} words in {columns.tokens} but {len(values)} tags in {columns.tags}. "
            "Each word needs one tag. Repair the row."
        )

    tags = [str(value) for value in values]
    if is_bio(label_ids):
        for index in find_broken_bio(tags):
            before = tags[index - 1] if index else "nothing"
            raise location.error(
                f"tag {index + 1} of {columns.tags} is {tags[index]} after {before}. In BIO, I- "
                "continues an entity that B- of the same kind started. Repair the row."
            )

    return Sample(
        [_require_not_blank(word, columns.tokens, location) for word in words],
        None,
        [_label_id(tag, label_ids, columns.tags, location) for tag in tags],
    )


def is_bio(labels: Iterable[str]) -> bool:
    """Return whether tags are exactly B-, I- and O (IOB2), with no other prefixes."""
    prefixes = {label[0] for label in labels if label[1:2] == "-"}
    return "B" in prefixes and prefixes <= {"B", "I"}


def find_broken_bio(tags: list[str]) -> Iterable[int]:
    """Yield the positions of I- tags that continue no entity."""
    for index, tag in enumerate(tags):
        if not tag.startswith("I-"):
            continue
        kind = tag[2:]
        if not index or tags[index - 1] not in (f"B-{kind}", f"I-{kind}"):
            yield index


def read_question_answering(
    row: Row, task: TaskSection, label_ids: Mapping[str, int], location: RowLocation
) -> Sample:
    """Read a question, its context and the position of the first answer in it."""
    columns = task.columns
    question = _read_text(row, columns.question, "question", location)
    context = _read_text(row, columns.context, "context", location)
    answers = _get(row, columns.answers, "answers", location)
    if not isinstance(answers, Mapping) or not {"text", "answer_start"} <= answers.keys():
        raise location.error(
            f"{columns.answers} is not {{text, answer_start}}. It must hold a list of texts and a "
            "list of their first characters. Repair the row."
        )

    texts, starts = (
        _require_list(answers[name], f"{columns.answers}.{name}", "answers", location)
        for name in ("text", "answer_start")
    )
    if len(texts) != len(starts):
        raise location.error(
            f"{columns.answers} has {len(texts)} texts but {len(starts)} positions. Their number "
            "must be the same. Repair the row."
        )

    if not texts:
        return Sample(question, context, None)

    text, start = texts[0], starts[0]
    if not text or start < 0 or context[start : start + len(text)] != text:
        raise location.error(
            f"the answer {text!r} is not at character {start} of {columns.context}. It must be "
            "a part of the context. Repair the row."
        )

    # blanks around the answer are not part of it
    start += len(text) - len(text.lstrip())
    return Sample(question, context, (start, start + len(text.strip())))


def read_seq2seq(
    row: Row, task: TaskSection, label_ids: Mapping[str, int], location: RowLocation
) -> Sample:
    """Read a source and its target."""
    source = _read_text(row, task.columns.source, "source", location)
    target = _read_text(row, task.columns.target, "target", location)
    return Sample(source, target)


def read_masked_lm(
    row: Row, task: TaskSection, label_ids: Mapping[str, int], location: RowLocation
) -> Sample:
    """Read a text."""
    return Sample(_read_text(row, task.columns.text, "text", location))


def read_embedding(
    row: Row, task: TaskSection, label_ids: Mapping[str, int], location: RowLocation
) -> Sample:
    """Read two texts that belong together."""
    text = _read_text(row, task.columns.text, "text", location)
    positive = _read_text(row, task.columns.pair or "positive", "pair", location)
    return Sample(text, positive)


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


def read_label_names(row: Row, task: TaskSection, location: RowLocation) -> list[str]:
    """Return the names of the labels in a row, for a task that chooses among labels."""
    if task.name == "token_classification":
        column, field = task.columns.tags, "tags"
    else:
        column, field = task.columns.label, "label"

    value = _get(row, column, field, location)
    if task.name == "sequence_classification":
        values = [value]
    else:
        values = _require_list(value, column, "labels", location)

    return [str(item) for item in values if item is not None]


def sort_labels(labels: Iterable[str]) -> tuple[str, ...]:
    """Return labels in the order of the head's outputs.

    Numbers are sorted by value. Otherwise O is first, then by name, I- after its B-.
    """
    unique = set(labels)
    if all(re.fullmatch(r"-?[0-9]+", label) for label in unique):
        return tuple(sorted(unique, key=int))

    def sort_key(label: str) -> tuple[bool, str, str]:
        prefix, _, kind = label.partition("-") if label[1:2] == "-" else ("", "", label)
        return label != OUTSIDE_TAG, kind, prefix

    return tuple(sorted(unique, key=sort_key))


def _read_texts(row: Row, task: TaskSection, location: RowLocation) -> TextPair:
    """Return the text of a row and its pair, if the task has one."""
    first = _read_text(row, task.columns.text, "text", location)
    if task.columns.pair is None:
        return TextPair(first, None)
    return TextPair(first, _read_text(row, task.columns.pair, "pair", location))


def _read_text(row: Row, column: str, field: str, location: RowLocation) -> str:
    """Return the text in a column; it must not be blank."""
    return _require_not_blank(_get(row, column, field, location), column, location)


def _label_id(value: Any, label_ids: Mapping[str, int], column: str, location: RowLocation) -> int:
    """Return the number of a label."""
    if value is None or str(value) not in label_ids:
        known = ", ".join(list(label_ids)[:MAX_LABELS_SHOWN])
        if len(label_ids) > MAX_LABELS_SHOWN:
            known += ", ..."
        raise location.error(
            f"{column} is {value!r}. The labels are {known}. Repair the row, or name all labels in "
            "task.labels of a new run."
        )

    return label_ids[str(value)]


def _require_list(value: Any, column: str, items: str, location: RowLocation) -> list[Any]:
    """Return a value that is a list of `items` (for errors)."""
    if not isinstance(value, list | tuple):
        raise location.error(
            f"{column} is a {type(value).__name__}. It must be a list of {items}. Convert it, "
            "or remove the row."
        )

    return list(value)


def _get(row: Row, column: str, field: str, location: RowLocation) -> Any:
    return get_column(row, column, f"task.columns.{field}", location)


def _require_not_blank(value: Any, where: str, location: RowLocation) -> str:
    """Return a value that is text and not blank."""
    if not require_text(value, where, location).strip():
        raise location.error(f"{where} is empty. It must be text. Convert it or remove the row.")
    return str(value)
