"""Entities as text: write tags as an answer for a model, and parse a generated answer into tags.

Pure functions. An answer is one line, `kind: words; kind: words`, or `none`. Guarantees: parsing
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


def entity_kinds(labels: Sequence[str]) -> tuple[str, ...]:
    """Return the kinds of entities among tags, in their order."""
    # a dict keeps the order of first occurrence
    kinds = dict.fromkeys(label[2:] for label in labels if label[1:2] == "-")
    return tuple(kinds)


def format_entities(words: Sequence[str], tags: Sequence[str], names: Mapping[str, str]) -> str:
    """Return BIO tags as an answer; `names` maps a kind to its name in the answer."""
    entities: list[tuple[str, list[str]]] = []
    for word, tag in zip(words, tags, strict=True):
        if tag.startswith("B-"):
            entities.append((tag[2:], [word]))
        elif tag.startswith("I-") and entities:
            entities[-1][1].append(word)

    if not entities:
        return NO_ENTITIES
    return "; ".join(f"{names[kind]}: {' '.join(entity)}" for kind, entity in entities)


def parse_entities(answer: str, words: Sequence[str], names: Mapping[str, str]) -> ParsedEntities:
    """Return the tags of `words` according to an answer.

    Args:
        answer: the generated text; its first line that is not empty counts.
        words: the words of the text.
        names: kind -> its name in the answer; case does not matter.
    """
    line = next((line.strip() for line in answer.splitlines() if line.strip()), "")
    kind_by_name = {name.casefold(): kind for kind, name in names.items()}
    tags = ["O"] * len(words)
    is_readable = line.casefold().rstrip(".") == NO_ENTITIES
    for part in line.split(";"):
        name, colon, text = part.partition(":")
        kind = kind_by_name.get(name.strip().casefold())
        if not colon or kind is None:
            continue
        is_readable = True
        entity = text.split()
        start = _find_untagged(entity, words, tags)
        if start is not None:
            tags[start : start + len(entity)] = [f"B-{kind}", *[f"I-{kind}"] * (len(entity) - 1)]

    return ParsedEntities(tags, is_readable)


def _find_untagged(entity: Sequence[str], words: Sequence[str], tags: Sequence[str]) -> int | None:
    """Return the first position where `entity` occurs in `words` and no word is tagged yet."""
    if not entity:
        return None
    for start in range(len(words) - len(entity) + 1):
        stop = start + len(entity)
        if list(words[start:stop]) == list(entity) and set(tags[start:stop]) == {"O"}:
            return start

    return None
