"""Held-out rows made otherwise: with typos, or with names swapped. Pure, and a function of seed and row.

Labels stay: what a row says must not change for a person, only for a model that reads letters or names.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable
from typing import Any

from dist_ft.config.sections.task import TaskSection
from dist_ft.core.errors import DataError
from dist_ft.core.seeds import (
    derive_seed,
)
from dist_ft.data.sources.discovery import Row

KEYBOARD = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
_WORD = re.compile(r"[^\W\d_]{2,}")


def perturbed_columns(task: TaskSection) -> tuple[str, ...]:
    """Return the columns whose texts may be made otherwise; in a question's context the answer must stay a part."""
    names = task.columns
    if task.name == "token_classification":
        return (names.tokens,)
    if task.name == "question_answering":
        return (names.question,)
    return (names.text,) if names.pair is None else (names.text, names.pair)


def perturb_row(row: Row, task: TaskSection, change: Callable[[str], str]) -> Row:
    """Return a row with `change` made to its texts; a list of words stays as long."""

    def made(value: Any) -> Any:
        if isinstance(value, list):
            return [change(word) if isinstance(word, str) else word for word in value]
        return change(value) if isinstance(value, str) else value

    return {**row, **{name: made(row[name]) for name in perturbed_columns(task) if name in row}}


def make_typo_function(rate: float, seed: int, number: int) -> Callable[[str], str]:
    """Return what gives a share `rate` of the words of row `number` one typo each."""
    rng = random.Random(derive_seed(seed, number))
    return lambda text: _WORD.sub(
        lambda found: add_typo(found[0], rng) if rng.random() < rate else found[0], text
    )


def add_typo(word: str, rng: random.Random) -> str:
    """Return a word of at least two letters with two of them swapped, one left out, or one hit beside its key."""
    kind, at = rng.choice(("swap", "drop", "beside")), rng.randrange(len(word))
    if kind == "swap":
        at = min(at, len(word) - 2)
        return word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    if kind == "drop":
        return word[:at] + word[at + 1 :]
    near = neighboring_keys(word[at].lower())
    if not near:  # a letter of another alphabet
        return word[:at] + word[at + 1 :]
    hit = rng.choice(near)
    return word[:at] + (hit.upper() if word[at].isupper() else hit) + word[at + 1 :]


def neighboring_keys(letter: str) -> str:
    """Return the letters whose keys touch that of `letter`; none for one that has no key."""
    for number, row in enumerate(KEYBOARD):
        at = row.find(letter)
        if at >= 0:
            above = KEYBOARD[number - 1][at : at + 2] if number else ""
            below = (
                KEYBOARD[number + 1][max(0, at - 1) : at + 1] if number + 1 < len(KEYBOARD) else ""
            )
            return row[max(0, at - 1) : at] + row[at + 1 : at + 2] + above + below
    return ""


def make_swap_function(pairs: Iterable[tuple[str, str]]) -> Callable[[str], str]:
    """Return what puts the other one of each pair in place of every whole word or name, at once and both ways.

    Raises DataError if a term stands in two pairs: it would not be clear what it becomes.
    """
    other: dict[str, str] = {}
    for first, second in pairs:
        for one, two in ((first, second), (second, first)):
            if other.setdefault(one, two) != two:
                raise DataError(
                    f"evaluation.robustness.swaps: {one} stands in two pairs; once is allowed; remove one"
                )
    if not other:
        raise DataError(
            "evaluation.robustness.swaps: names no pair; at least one is needed; add it"
        )
    longest_first = sorted(other, key=len, reverse=True)
    pattern = re.compile(r"(?<!\w)(?:" + "|".join(map(re.escape, longest_first)) + r")(?!\w)")
    return lambda text: pattern.sub(lambda found: other[found[0]], text)
