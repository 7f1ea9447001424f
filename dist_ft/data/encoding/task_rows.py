"""Read texts, lists and labels from a row, for the tasks.

Pure functions. Every error names shard and row.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from dist_ft.config.sections.task import ColumnsSection
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
        label: in the form of the task, see `read` of its class.
    """

    first: Any
    second: str | None = None
    label: Any = None


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


def sort_labels(labels: Iterable[str]) -> tuple[str, ...]:
    """Return labels in the order of the head's outputs.

    Numbers are sorted by value. Otherwise O is first, then by name, I- after its B-.
    """
    unique = set(labels)
    # Python converts no more than some thousand digits, and no label needs more than these.
    if all(re.fullmatch(r"-?[0-9]{1,30}", label) for label in unique):
        # By name too: the order of "1" and "01" must not depend on that of the set.
        return tuple(sorted(unique, key=lambda label: (int(label), label)))

    def sort_key(label: str) -> tuple[bool, str, str]:
        prefix, _, kind = label.partition("-") if label[1:2] == "-" else ("", "", label)
        return label != OUTSIDE_TAG, kind, prefix

    return tuple(sorted(unique, key=sort_key))


def read_texts(row: Row, columns: ColumnsSection, location: RowLocation) -> TextPair:
    """Return the text of a row and its pair, if the task has one."""
    first = read_text(row, columns.text, "text", location)
    if columns.pair is None:
        return TextPair(first, None)
    return TextPair(first, read_text(row, columns.pair, "pair", location))


def read_text(row: Row, column: str, field: str | None, location: RowLocation) -> str:
    """Return the text in a column; it must not be blank. `field`: see `get_value`."""
    return require_not_blank(get_value(row, column, field, location), column, location)


def get_label_id(
    value: Any, label_ids: Mapping[str, int], column: str, location: RowLocation
) -> int:
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


def require_list(value: Any, column: str, items: str, location: RowLocation) -> list[Any]:
    """Return a value that is a list of `items` (for errors)."""
    if not isinstance(value, list | tuple):
        raise location.error(
            f"{column} is a {type(value).__name__}. It must be a list of {items}. Convert it, "
            "or remove the row."
        )

    return list(value)


def get_value(row: Row, column: str, field: str | None, location: RowLocation) -> Any:
    """Return the value in a column, which the field task.columns.`field` names, if any."""
    return get_column(row, column, f"task.columns.{field}" if field else None, location)


def require_not_blank(value: Any, where: str, location: RowLocation) -> str:
    """Return a value that is text and not blank."""
    if not require_text(value, where, location).strip():
        raise location.error(f"{where} is empty. It must be text. Convert it or remove the row.")
    return str(value)
