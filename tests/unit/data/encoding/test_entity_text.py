"""Entities as text and back; any generated text can be parsed."""

from __future__ import annotations

import random

import pytest

from dist_ft.data.encoding import entity_text, task_rows

NAMES = {"person": "person", "creative-work": "work of art"}
WORDS = ["Mary", "Ann", "saw", "Dune", "with", "Mary", "in", "Rome"]


@pytest.mark.parametrize(
    ("answer", "tags"),
    [
        (" person: Mary Ann; work of art: Dune", "B-person I-person O B-creative-work O O O O"),
        ("PERSON : Mary\nperson: Rome", "B-person O O O O O O O"),
        ("person: Mary; person: Mary", "B-person O O O O B-person O O"),
        ("person: mary ann", "O O O O O O O O"),
        ("person: Ann saw Dune; work of art: Dune", "O B-person I-person I-person O O O O"),
        ("planet: Rome; ;;:; person:", "O O O O O O O O"),
        ("none", "O O O O O O O O"),
        ("", "O O O O O O O O"),
        ("\n\n person: Rome. \n", "O O O O O O O O"),
        ("person: Mary Ann saw Dune with Mary in Rome again", "O O O O O O O O"),
    ],
)
def test_answers_are_parsed(answer, tags):
    assert entity_text.parse_entities(answer, WORDS, NAMES).tags == tags.split()


@pytest.mark.parametrize(
    ("answer", "is_readable"),
    [
        ("none", True),
        ("None.", True),
        ("person: Zoe", True),
        ("I think that", False),
        ("planet: Rome", False),
        ("", False),
    ],
)
def test_unreadable_answer_is_reported(answer, is_readable):
    assert entity_text.parse_entities(answer, WORDS, NAMES).is_readable is is_readable


def test_formatted_entities_are_parsed_back():
    tags = ["B-person", "I-person", "O", "B-creative-work", "O", "B-person", "O", "O"]
    answer = entity_text.format_entities(WORDS, tags, NAMES)
    assert answer == "person: Mary Ann; work of art: Dune; person: Mary"
    assert entity_text.parse_entities(answer, WORDS, NAMES) == (tags, True)
    assert entity_text.format_entities(WORDS, ["O"] * 8, NAMES) == "none"


def test_garbage_gives_valid_bio_tags():
    rng = random.Random(0)
    pieces = [*WORDS, "person", "work of art", ":", ";", "\n", ": :", "\x00", "{}", "é", "none"]
    for _ in range(3000):
        answer = rng.choice(["", " "]).join(rng.choices(pieces, k=rng.randint(0, 12)))
        tags, _ = entity_text.parse_entities(answer, WORDS, NAMES)
        assert len(tags) == len(WORDS) and not list(task_rows.find_broken_bio(tags))


def test_entity_types_are_in_the_order_of_labels():
    assert entity_text.entity_types(["O", "B-person", "I-person", "B-group", "I-group"]) == (
        "person",
        "group",
    )
