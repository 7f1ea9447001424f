"""Perturb held-out rows: add typos, or swap names.

Pure functions of seed and row. Labels stay the same: the meaning of a row must not change for a
person, only its letters or names for a model.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable
from typing import Any

from dist_ft.core.errors import DataError
from dist_ft.core.seeds import derive_seed
from dist_ft.data.sources.discovery import Row

KEYBOARD = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
_WORD = re.compile(r"[^\W\d_]{2,}")


def perturb_row(row: Row, columns: Iterable[str], change: Callable[[str], str]) -> Row:
    """Return a row with `change` applied to the texts of `columns`.

    A list of words keeps its length.
    """
    changed = {}
    for name in columns:
        if name in row:
            changed[name] = _change_value(row[name], change)
    return {**row, **changed}


def _change_value(value: Any, change: Callable[[str], str]) -> Any:
    """Apply `change` to a text, or to each text of a list; other values stay."""
    if isinstance(value, str):
        return change(value)
    if not isinstance(value, list):
        return value

    # word by word, so that tags and other columns of the same length still fit
    changed = []
    for word in value:
        if isinstance(word, str):
            word = change(word)
        changed.append(word)
    return changed


def make_typo_function(rate: float, seed: int, number: int) -> Callable[[str], str]:
    """Return a function that adds one typo to a share `rate` of the words of row `number`."""
    # One generator for all columns of the row: its draws follow the order of the columns.
    rng = random.Random(derive_seed(seed, number))

    def change_word(match: re.Match[str]) -> str:
        if rng.random() < rate:
            return add_typo(match[0], rng)
        return match[0]

    def change_text(text: str) -> str:
        return _WORD.sub(change_word, text)

    return change_text


def add_typo(word: str, rng: random.Random) -> str:
    """Return a word of at least two letters with one typo.

    Two letters are swapped, one is dropped, or one is replaced by that of a neighboring key.
    """
    kind = rng.choice(("swap", "drop", "neighbor"))
    position = rng.randrange(len(word))

    if kind == "swap":
        # the last letter has none after it to be swapped with
        position = min(position, len(word) - 2)
        first, second = word[position], word[position + 1]
        return word[:position] + second + first + word[position + 2 :]

    before, letter, after = word[:position], word[position], word[position + 1 :]
    neighbors = neighboring_keys(letter.lower())
    if kind == "drop" or not neighbors:  # a letter of another alphabet has no neighbors
        return before + after

    neighbor = rng.choice(neighbors)
    if letter.isupper():
        neighbor = neighbor.upper()
    return before + neighbor + after


def neighboring_keys(letter: str) -> str:
    """Return the letters whose keys touch the key of `letter`; empty for a letter without a key."""
    for number, row in enumerate(KEYBOARD):
        column = row.find(letter)
        if column < 0:
            continue

        # Each row of keys is shifted to the right by half a key.
        left = max(0, column - 1)
        above = ""
        if number > 0:
            above = KEYBOARD[number - 1][column : column + 2]

        below = ""
        if number + 1 < len(KEYBOARD):
            below = KEYBOARD[number + 1][left : column + 1]

        return row[left:column] + row[column + 1 : column + 2] + above + below

    return ""


def make_swap_function(pairs: Iterable[tuple[str, str]]) -> Callable[[str], str]:
    """Return a function that swaps the words or names of each pair, as whole words.

    All pairs are replaced at once and both ways.

    Raises:
        DataError: a term is in two pairs, so that its replacement is ambiguous; or there is no
            pair.
    """
    replacements: dict[str, str] = {}
    for first, second in pairs:
        for term, other in ((first, second), (second, first)):
            if replacements.setdefault(term, other) != other:
                raise DataError(
                    f"evaluation.robustness.swaps: {term} is in two pairs. Once is allowed. "
                    "Remove one."
                )

    if not replacements:
        raise DataError(
            "evaluation.robustness.swaps: has no pair. At least one is needed. Add one."
        )

    # An alternation takes the first term that fits: "Anna" before "Ann". One pattern for all terms,
    # so that a replaced name is not replaced back.
    longest_first = sorted(replacements, key=len, reverse=True)
    pattern = re.compile(r"(?<!\w)(?:" + "|".join(map(re.escape, longest_first)) + r")(?!\w)")

    def swap_terms(text: str) -> str:
        return pattern.sub(lambda match: replacements[match[0]], text)

    return swap_terms
