"""Entities as text: how examples are written for a model, and how what it writes becomes tags.

Pure. An answer is one line, `kind: words; kind: words`, or `none`. Guarantees: reading never fails, whatever a model
writes; an entity counts where its words stand in the text one after the other, each place once; tags are whole BIO.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

NO_ENTITIES = "none"


def entity_kinds(labels: Sequence[str]) -> tuple[str, ...]:
    """Return the kinds of entities among tags, in their order."""
    return tuple(dict.fromkeys(label[2:] for label in labels if label[1:2] == "-"))


def format_entities(words: Sequence[str], tags: Sequence[str], names: Mapping[str, str]) -> str:
    """Return the answer that tags BIO stand for; `names` are what kinds are called."""
    found: list[tuple[str, list[str]]] = []
    for word, tag in zip(words, tags, strict=True):
        if tag.startswith("B-"):
            found.append((tag[2:], [word]))
        elif tag.startswith("I-") and found:
            found[-1][1].append(word)
    return "; ".join(f"{names[kind]}: {' '.join(own)}" for kind, own in found) or NO_ENTITIES


def parse_entities(answer: str, words: Sequence[str], names: Mapping[str, str]) -> tuple[list[str], bool]:
    """Return the tags of `words` that an answer stands for, and whether anything of it could be read.

    Args:
        answer: what a model wrote; the first line that is not empty counts.
        words: of the text.
        names: kind -> what it is called; case does not matter.
    """
    line = next((line.strip() for line in answer.splitlines() if line.strip()), "")
    tags = ["O"] * len(words)
    known = {name.casefold(): kind for kind, name in names.items()}
    understood = line.casefold().rstrip(".") == NO_ENTITIES
    for part in line.split(";"):
        name, colon, text = part.partition(":")
        kind = known.get(name.strip().casefold())
        if not colon or kind is None:
            continue
        understood = True
        own = text.split()
        at = _place(own, words, tags)
        if at is not None:
            tags[at : at + len(own)] = [f"B-{kind}", *[f"I-{kind}"] * (len(own) - 1)]
    return tags, understood


def _place(own: Sequence[str], words: Sequence[str], tags: Sequence[str]) -> int | None:
    """Return the first place where `own` stands in `words` and nothing is tagged yet."""
    for at in range(len(words) - len(own) + 1) if own else ():
        if list(words[at : at + len(own)]) == list(own) and set(tags[at : at + len(own)]) == {"O"}:
            return at
    return None
