"""Prompts for labels: what stands before a row, which examples it is shown, and which words stand for a label.

Pure. Guarantees: the tokens of a label's words are those they have after the prompt, so that scoring a label and
learning it mean the same tokens; examples are a function of seed and the rows' own order. Does not run a model.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from dist_ft.config.schema import PromptingSection
from dist_ft.core.errors import ConfigError
from dist_ft.core.seeds import (
    derive_seed,
)
from dist_ft.data.encoding.task_rows import Sample

ALL_EXAMPLES = 2**31
"""More examples than there are."""
CONTENT_FREE_TEXTS = ("N/A", "", "[MASK]")
"""Texts without content (Zhao et al., arXiv:2102.09690)."""


@dataclass(frozen=True)
class LabelWords:
    """The words of all labels as tokens.

    Attributes:
        ids: of each label, in their order; at least one each.
        no_content: prompts without content; none: scores are not calibrated.
        mean: a label's score is the mean log-probability of its tokens; else their sum.
    """

    ids: tuple[tuple[int, ...], ...]
    no_content: tuple[tuple[int, ...], ...] = ()
    mean: bool = False

    @property
    def longest(self) -> int:
        """Tokens of the longest label."""
        return max(map(len, self.ids))


def fill_template(template: str, text: str, pair: str | None = None) -> str:
    """Return a template with a row's texts in their places; texts may hold braces."""
    return template.format(text=text, pair=pair or "")


def verbalize(label: str, section: PromptingSection) -> str:
    """Return the words of a label, with the blank before them: those of the config, or its own name."""
    return section.verbalizers.get(label, " " + label.replace("_", " "))


def format_example(
    template: str, sample: Sample, labels: Sequence[str], section: PromptingSection
) -> str:
    """Return an example: a prompt and the words of its label."""
    return fill_template(template, sample.first, sample.second) + verbalize(labels[sample.label], section)


def prepend_examples(template: str, shown: Sequence[str], separator: str) -> str:
    """Return the template that shows answered examples first."""
    before = "".join(example + separator for example in shown)
    return before.replace("{", "{{").replace("}", "}}") + template


def draw_per_class(samples: Iterable[tuple[Any, Any]], count: int, seed: int) -> list[Any]:
    """Return `count` of each kind among (kind, sample), or all there are, in an order drawn by `seed`.

    Which are drawn, and their order, follow from the place of each among `samples`; memory is that of what is drawn.
    """
    kept: dict[Any, list[tuple[int, int, Any]]] = {}
    for number, (kind, sample) in enumerate(samples):
        own = kept.setdefault(kind, [])
        entry = (
            -derive_seed(seed, number),
            number,
            sample,
        )  # the smallest hashes stay: a heap of their negatives
        if len(own) < count:
            heapq.heappush(own, entry)
        else:
            heapq.heappushpop(own, entry)
    return [
        sample
        for _, _, sample in sorted(
            (entry for own in kept.values() for entry in own),
            key=lambda entry: (-entry[0], entry[1]),
        )
    ]


def tokenize_label(backend: Any, template: str, words: str) -> tuple[int, ...]:
    """Return the tokens of a label's words as they stand after a prompt.

    Args:
        backend: the tokenizer's (`fast.exact_backend`).
        template: whose end comes before them.
        words: with the blank before them.

    Raises:
        ConfigError: the words share a token with the prompt's end, or have none.
    """
    end = template.format(text="\0", pair="\0").rpartition("\0")[2] or "a"
    before = backend.encode(end, add_special_tokens=False).ids
    both = backend.encode(end + words, add_special_tokens=False).ids
    if both[: len(before)] != before or len(both) == len(before):
        raise ConfigError(
            [
                f"prompting.verbalizers={words!r}: after the template's end {end[-20:]!r} it is no token of "
                "its own; a template without a blank at its end and words that begin with one are allowed; "
                "move the blank"
            ],
            "prompting",
        )
    return tuple(both[len(before) :])
