"""Perturbed rows: typos by seed and rate, names swapped both ways at once."""

from __future__ import annotations

import random

import pytest

from dist_ft.config.sections.task import TaskSection
from dist_ft.core.errors import DataError
from dist_ft.data.tools import perturb
from dist_ft.tasks.base import make_task

TEXT = "Seven wise owls watch the rivers run between old stones, and 12 children count it. " * 20


def test_typos_depend_only_on_seed_and_row():
    assert (
        perturb.make_typo_function(0.5, 3, 7)(TEXT)
        == perturb.make_typo_function(0.5, 3, 7)(TEXT)
        != TEXT
    )
    assert (
        len(
            {
                perturb.make_typo_function(0.5, seed, number)(TEXT)
                for seed in (3, 4)
                for number in (7, 8)
            }
        )
        == 4
    )


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_share_of_words_with_a_typo_is_the_rate(rate):
    words, noisy = TEXT.split(), perturb.make_typo_function(rate, 1, 1)(TEXT).split()
    assert len(words) == len(noisy)
    letters = [(a, b) for a, b in zip(words, noisy, strict=True) if sum(map(str.isalpha, a)) > 1]
    same_pair = sum(
        1 for a, b in letters if a != b
    )  # swapping two equal letters makes no difference
    assert same_pair / len(letters) == pytest.approx(rate, abs=0.06)
    assert all(a == b for a, b in zip(words, noisy, strict=True) if a == "12")


def test_typo_is_a_swap_a_drop_or_a_neighboring_key():
    rng, seen = random.Random(0), set()
    for _ in range(300):
        found = perturb.add_typo("Word", rng)
        if len(found) == 3:
            assert found in {"ord", "Wrd", "Wod", "Wor"}
            seen.add("drop")
        elif sorted(found) == sorted("Word"):
            assert found in {"oWrd", "Wrod", "Wodr"}
            seen.add("swap")
        else:
            (position,) = [i for i in range(4) if found[i] != "Word"[i]]
            assert found[position].lower() in perturb.neighboring_keys("word"[position]) and found[
                position
            ].isupper() == (position == 0)
            seen.add("neighbor")
    assert seen == {"drop", "swap", "neighbor"}


@pytest.mark.parametrize(
    ("letter", "keys"), [("q", "wa"), ("g", "fhtyvb"), ("m", "njk"), ("p", "ol"), ("ü", "")]
)
def test_neighboring_keys(letter, keys):
    assert set(perturb.neighboring_keys(letter)) == set(keys)


def test_neighboring_keys_are_symmetric():
    for row in perturb.KEYBOARD:
        for letter in row:
            assert all(
                letter in perturb.neighboring_keys(other)
                for other in perturb.neighboring_keys(letter)
            ), letter


def test_names_are_swapped_both_ways_as_whole_words():
    swap = perturb.make_swap_function([("Emma", "Ahmed"), ("New York", "Lagos")])
    assert (
        swap("Emma met Ahmed in New York; Emmanuel stayed in Lagos")
        == "Ahmed met Emma in Lagos; Emmanuel stayed in New York"
    )
    assert swap("ReEmma and LiEmmas") == "ReEmma and LiEmmas"
    assert swap(swap(TEXT + " Emma")) == TEXT + " Emma"


def test_term_in_two_pairs_is_refused():
    with pytest.raises(DataError, match="Ahmed is in two pairs"):
        perturb.make_swap_function([("Emma", "Ahmed"), ("Ahmed", "Li")])
    with pytest.raises(DataError, match="has no pair"):
        perturb.make_swap_function([])


@pytest.mark.parametrize(
    ("task", "row", "changed"),
    [
        (
            {"name": "sequence_classification", "columns": {"pair": "other"}},
            {"text": "ab", "other": "cd", "label": "ef"},
            {"text", "other"},
        ),
        (
            {"name": "token_classification"},
            {"tokens": ["ab", "cd"], "tags": ["O", "O"]},
            {"tokens"},
        ),
        (
            {"name": "question_answering"},
            {"question": "ab", "context": "cd", "answers": {}},
            {"question"},
        ),
    ],
)
def test_columns_that_hold_the_answer_do_not_change(task, row, changed):
    columns = make_task(TaskSection.model_validate(task)).text_columns()
    changed_row = perturb.perturb_row(row, columns, str.upper)
    assert {name for name in row if row[name] != changed_row[name]} == changed
