"""Entities as text: write tags as an answer for a model, and parse a generated answer into tags.

Pure functions. An answer is one line, `type: words; type: words`, or `none`. Guarantees: parsing
never fails, whatever a model generates; an entity counts where its words occur consecutively in the
text, each position once; the tags are valid BIO.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

NO_ENTITIES = "none"


class ParsedEntities(NamedTuple):
    """The result of parsing an answer.

    Attributes:
        tags: the BIO tag of each word.
        is_readable: whether any part of the answer could be parsed.
    """

    tags: list[str]
    is_readable: bool


def entity_types(labels: Sequence[str]) -> tuple[str, ...]:
    """Return the entity types of BIO tags, in order of first occurrence."""
    # a dict retains the order of first occurrence
    return tuple(dict.fromkeys(label[2:] for label in labels if label[1:2] == "-"))


def format_entities(words: Sequence[str], tags: Sequence[str], names: Mapping[str, str]) -> str:
    """Return BIO tags as an answer; `names` maps an entity type to its name in the answer."""
    entities: list[tuple[str, list[str]]] = []
    for word, tag in zip(words, tags, strict=True):
        if tag.startswith("B-"):
            entities.append((tag[2:], [word]))
        elif tag.startswith("I-") and entities:
            # an I- tag before any B- tag has nothing to continue
            entities[-1][1].append(word)

    if not entities:
        return NO_ENTITIES
    return "; ".join(
        f"{names[entity_type]}: {' '.join(entity)}" for entity_type, entity in entities
    )


def parse_entities(answer: str, words: Sequence[str], names: Mapping[str, str]) -> ParsedEntities:
    """Return the tags of `words` according to an answer.

    Args:
        answer: the generated text; its first line that is not empty counts.
        words: the words of the text.
        names: entity type -> its name in the answer; case does not matter.
    """
    # models often start with a blank line, or continue after the answer
    line = next((line.strip() for line in answer.splitlines() if line.strip()), "")
    type_by_name = {name.casefold(): entity_type for entity_type, name in names.items()}
    tags = ["O"] * len(words)
    is_readable = line.casefold().rstrip(".") == NO_ENTITIES

    for part in line.split(";"):
        name, colon, text = part.partition(":")
        entity_type = type_by_name.get(name.strip().casefold())
        if not colon or entity_type is None:
            continue

        # a known type is readable, even if its words do not occur in the text
        is_readable = True
        entity = text.split()
        start = _find_untagged(entity, words, tags)
        if start is not None:
            inside = [f"I-{entity_type}"] * (len(entity) - 1)
            tags[start : start + len(entity)] = [f"B-{entity_type}", *inside]

    return ParsedEntities(tags, is_readable)


def _find_untagged(entity: Sequence[str], words: Sequence[str], tags: Sequence[str]) -> int | None:
    """Return the first position where `entity` occurs in `words` and no word is tagged yet."""
    if not entity:
        return None

    # The same words may occur several times: each mention in the answer takes the next one.
    for start in range(len(words) - len(entity) + 1):
        stop = start + len(entity)
        if list(words[start:stop]) == list(entity) and set(tags[start:stop]) == {"O"}:
            return start

    return None
