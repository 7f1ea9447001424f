"""Rows made otherwise: typos by seed and rate, names swapped both ways at once."""

from __future__ import annotations

import random

import pytest

from dist_ft.config.sections.task import TaskSection
from dist_ft.core.errors import DataError
from dist_ft.data.tools import perturb

TEXT = "Seven wise owls watch the rivers run between old stones, and 12 children count it. " * 20


def test_typos_follow_from_seed_and_row_alone():
    assert perturb.typos(0.5, 3, 7)(TEXT) == perturb.typos(0.5, 3, 7)(TEXT) != TEXT
    assert (
        len({perturb.typos(0.5, seed, number)(TEXT) for seed in (3, 4) for number in (7, 8)}) == 4
    )


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_so_many_words_have_one(rate):
    words, noisy = TEXT.split(), perturb.typos(rate, 1, 1)(TEXT).split()
    assert len(words) == len(noisy)
    letters = [(a, b) for a, b in zip(words, noisy, strict=True) if sum(map(str.isalpha, a)) > 1]
    same_pair = sum(
        1 for a, b in letters if a != b
    )  # two equal letters that are swapped make no difference
    assert same_pair / len(letters) == pytest.approx(rate, abs=0.06)
    assert all(a == b for a, b in zip(words, noisy, strict=True) if a == "12")


def test_a_typo_is_a_swap_a_gap_or_a_key_beside():
    rng, seen = random.Random(0), set()
    for _ in range(300):
        found = perturb.typo("Word", rng)
        if len(found) == 3:
            assert found in {"ord", "Wrd", "Wod", "Wor"}
            seen.add("drop")
        elif sorted(found) == sorted("Word"):
            assert found in {"oWrd", "Wrod", "Wodr"}
            seen.add("swap")
        else:
            (at,) = [i for i in range(4) if found[i] != "Word"[i]]
            assert found[at].lower() in perturb.beside("word"[at]) and found[at].isupper() == (
                at == 0
            )
            seen.add("beside")
    assert seen == {"drop", "swap", "beside"}


@pytest.mark.parametrize(
    ("letter", "keys"), [("q", "wa"), ("g", "fhtyvb"), ("m", "njk"), ("p", "ol"), ("ü", "")]
)
def test_keys_beside(letter, keys):
    assert set(perturb.beside(letter)) == set(keys)


def test_keys_are_beside_each_other():
    for row in perturb.KEYBOARD:
        for letter in row:
            assert all(letter in perturb.beside(other) for other in perturb.beside(letter)), letter


def test_names_are_swapped_both_ways_as_whole_words():
    swap = perturb.swaps([("Emma", "Ahmed"), ("New York", "Lagos")])
    assert (
        swap("Emma met Ahmed in New York; Emmanuel stayed in Lagos")
        == "Ahmed met Emma in Lagos; Emmanuel stayed in New York"
    )
    assert swap("ReEmma and LiEmmas") == "ReEmma and LiEmmas"
    assert swap(swap(TEXT + " Emma")) == TEXT + " Emma"


def test_a_term_in_two_pairs_is_refused():
    with pytest.raises(DataError, match="Ahmed stands in two pairs"):
        perturb.swaps([("Emma", "Ahmed"), ("Ahmed", "Li")])
    with pytest.raises(DataError, match="names no pair"):
        perturb.swaps([])


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
def test_what_an_answer_needs_stays(task, row, changed):
    made = perturb.altered(row, TaskSection.model_validate(task), str.upper)
    assert {name for name in row if row[name] != made[name]} == changed
