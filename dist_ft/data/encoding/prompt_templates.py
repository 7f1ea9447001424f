"""Prompts for labels: the template around a row, the examples before it, the label words.

Pure functions. Guarantees: the tokens of a label's words are those they have after the prompt, so
that scoring a label and training on it use the same tokens; examples are a function of the seed and
of the order of the rows. No model runs here.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from dist_ft.config.schema import PromptingSection
from dist_ft.config.sections.prompting import template_problem
from dist_ft.core.errors import ConfigError
from dist_ft.core.seeds import derive_seed
from dist_ft.data.encoding.task_rows import Sample

ALL_EXAMPLES = 2**31
"""More examples than any dataset has."""
CONTENT_FREE_TEXTS = ("N/A", "", "[MASK]")
"""Texts without content, to calibrate scores (Zhao et al., arXiv:2102.09690)."""


@dataclass(frozen=True)
class LabelWords:
    """The words of all labels as tokens.

    Attributes:
        ids: the token ids of each label, in the order of the labels; at least one each.
        content_free_prompts: token ids of prompts without content; empty if scores are not
            calibrated.
        use_mean: a label's score is the mean log-probability of its tokens, else the sum.
    """

    ids: tuple[tuple[int, ...], ...]
    content_free_prompts: tuple[tuple[int, ...], ...] = ()
    use_mean: bool = False

    @property
    def longest(self) -> int:
        """The number of tokens of the longest label."""
        return max(map(len, self.ids))


class _Drawn(NamedTuple):
    """A drawn sample; the first fields are the sort key of the heap.

    Attributes:
        negative_hash: minus the hash of the sample's position.
        position: the sample's position, from 0.
        sample: the sample.
    """

    negative_hash: int
    position: int
    sample: Any


def fill_template(template: str, text: str, pair: str | None = None) -> str:
    """Return a template filled with a row's texts, which may hold braces."""
    require_prompt_template(template)
    # only the template's own braces are fields: `format` does not look into what it inserts
    return template.format(text=text, pair=pair or "")


@lru_cache(maxsize=1024)
def require_prompt_template(template: str) -> None:
    """Refuse a template that `fill_template` cannot fill.

    Raises:
        ConfigError: it has other fields than {text} and {pair}.
    """
    problem = template_problem(template)
    if problem is not None:
        raise ConfigError([problem], "prompting")


def verbalize(label: str, section: PromptingSection) -> str:
    """Return the words of a label with a blank before them: the config's, or its own name."""
    return section.verbalizers.get(label, " " + label.replace("_", " "))


def format_example(
    template: str, sample: Sample, labels: Sequence[str], section: PromptingSection
) -> str:
    """Return an example: a prompt followed by the words of its label."""
    prompt = fill_template(template, sample.first, sample.second)
    return prompt + verbalize(labels[sample.label], section)


def prepend_examples(template: str, examples: Sequence[str], separator: str) -> str:
    """Return the template with examples before it; braces in the examples are escaped."""
    before = "".join(example + separator for example in examples)
    # the result is a template again, which `fill_template` fills
    return before.replace("{", "{{").replace("}", "}}") + template


def draw_per_class(samples: Iterable[tuple[Hashable, Any]], count: int, seed: int) -> list[Any]:
    """Draw `count` samples of each class, or all if a class has fewer, in an order drawn by `seed`.

    The draw and its order follow from the position of each sample. Memory is that of the drawn
    samples.

    Args:
        samples: (class, sample) pairs.
        count: samples per class.
        seed: decides which are drawn, and their order.
    """
    drawn: dict[Hashable, list[_Drawn]] = {}
    for position, (group, sample) in enumerate(samples):
        heap = drawn.setdefault(group, [])
        # The smallest hashes stay: a heap of their negatives drops the largest hash. Positions
        # differ, so two entries never compare their samples.
        entry = _Drawn(-derive_seed(seed, position), position, sample)
        if len(heap) < count:
            heapq.heappush(heap, entry)
        else:
            heapq.heappushpop(heap, entry)

    entries: list[_Drawn] = []
    for heap in drawn.values():
        entries += heap

    # by hash over all classes, so that the examples of a class do not follow one another
    entries.sort(key=lambda entry: (-entry.negative_hash, entry.position))
    return [entry.sample for entry in entries]


def tokenize_label(backend: Any, template: str, words: str) -> tuple[int, ...]:
    """Return the tokens of a label's words as they are after a prompt.

    Args:
        backend: the backend of `fast_tokenizer.exact_backend`.
        template: the template whose end precedes the words.
        words: the words, with the blank before them.

    Raises:
        ConfigError: the words share a token with the end of the prompt, or have no token.
    """
    # What follows the last text of the row. A template that ends with the row's text has no fixed
    # end: a letter stands for it.
    filled = fill_template(template, "\0", "\0")
    end = filled.rpartition("\0")[2] or "a"

    # Words alone would be tokenized as at the start of a text, with other tokens.
    end_ids = backend.encode(end, add_special_tokens=False).ids
    all_ids = backend.encode(end + words, add_special_tokens=False).ids
    if all_ids[: len(end_ids)] != end_ids or len(all_ids) == len(end_ids):
        raise ConfigError(
            [
                f"prompting.verbalizers={words!r}: has no token of its own after the template's "
                f"end {end[-20:]!r}. The template must not end with a blank, and words must start "
                "with one. Move the blank."
            ],
            "prompting",
        )

    return tuple(all_ids[len(end_ids) :])
