"""The section `prompting`: labels from a model without a head, by prompts or prototypes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from string import Formatter
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from dist_ft.config.sections.section import Identity, Section, as_tuple
from dist_ft.config.sections.task import TaskSection

MAX_FIELDS = 100
"""Places of a row's texts in one prompt."""


def _as_words(value: Any) -> Any:
    """Accept numbers as names of labels."""
    # YAML reads the labels 0 and 1 as numbers.
    if not isinstance(value, dict):
        return value
    return {str(label): words for label, words in value.items()}


class PromptingSection(Section):
    """How a model predicts labels without a head."""

    # Prompts and words of labels are what is trained on, so they belong to the identity.
    method: Literal["none", "likelihood", "generation", "prototypes"] = Identity(
        "none",
        description=(
            "none: the task's head; likelihood: sequence_classification by the probability that a "
            "causal model gives to each label's words after a prompt (can be trained: those words "
            "are the targets); generation: token_classification by entities that a causal model "
            "generates; prototypes: sequence_classification by the nearest mean vector of some "
            "examples. `evaluate` uses the head of models that have one for the task."
        ),
    )
    templates: Annotated[tuple[str, ...], BeforeValidator(as_tuple)] = Identity(
        (),
        description=(
            "Prompts, with {text} (and {pair}) for the row's texts, other braces doubled, and no "
            "space at the end. `evaluate` compares several; training uses the first. Empty: a "
            "built-in one for generation."
        ),
    )
    verbalizers: Annotated[dict[str, str], BeforeValidator(_as_words)] = Identity(
        {},
        description=(
            "likelihood: label -> the words that stand for it, with the space before them; "
            "generation: entity type -> its name in prompts; empty: the label, with spaces for "
            "'_'."
        ),
    )
    shots: int = Identity(
        0,
        ge=0,
        description=(
            "Examples with answers before each prompt (few-shot), sampled from data.train; "
            "prototypes: examples per label for its vector, 0: all."
        ),
    )
    shots_by: Literal["label", "all"] = Identity(
        "label", description="likelihood: shots is the number per label, or in total."
    )
    separator: str = Identity(
        "\n\n", description="Text between two examples, and before the row to predict."
    )
    seed: int = Identity(
        0, ge=0, lt=2**63, description="Seed of the sampled examples and of their order."
    )
    normalize: Literal["sum", "mean"] = Identity(
        "sum",
        description=(
            "likelihood: sum of the log-probabilities of a label's tokens, or their mean (labels "
            "of unequal length)."
        ),
    )
    calibrate: bool = Identity(
        False,
        description=(
            "likelihood: divide the probability of a label by its probability after content-free "
            "prompts (contextual calibration, arXiv:2102.09690)."
        ),
    )
    # Only for generation, which is never trained.
    max_new_tokens: int = Field(
        64, ge=1, description="generation: maximum length of an answer, in tokens."
    )


def get_model_task(task: TaskSection, prompting: PromptingSection) -> TaskSection:
    """Return the task that the model itself is loaded for: with a prompt it continues text."""
    # Both need a causal model's next tokens, whatever task the labels belong to.
    if prompting.method in ("likelihood", "generation"):
        return TaskSection()

    # Prototypes are mean vectors of texts.
    if prompting.method == "prototypes":
        return TaskSection(name="embedding")
    return task


def untrainable_problems(prompting: PromptingSection) -> Iterator[str]:
    """Yield a line if the method cannot be trained."""
    if prompting.method in ("generation", "prototypes"):
        yield (
            f"prompting.method={prompting.method}: it has nothing to train. `dist-ft evaluate` "
            "allows it, training allows none or likelihood. Use evaluate, or set another method."
        )


def _method(prompting: PromptingSection) -> Iterator[str]:
    if prompting.method == "none" and prompting != PromptingSection():
        yield (
            "prompting.method=none: other fields of prompting are set, but not used. Allowed with "
            "likelihood, generation and prototypes. Set one of them, or remove the section."
        )


def template_problem(
    template: str,
    path: str = "prompting.templates",
    allowed: Sequence[str] = ("text", "pair"),
) -> str | None:
    """Return what is wrong with a prompt; None if only its fields are filled with texts.

    A format string can also read attributes, and pad a text to any length.

    Args:
        template: text with fields in braces.
        path: the field of the config that holds it.
        allowed: names of the fields that it may have.
    """
    shown = f"{path}={template[:60]!r}"
    names = " and ".join(f"{{{name}}}" for name in allowed)
    remedy = f"Only {names} are allowed, other braces doubled ({{{{ and }}}}). Correct it."
    try:
        fields = list(Formatter().parse(template))
    except ValueError as error:
        return f"{shown}: {error}. {remedy}"

    num_fields = 0
    for _, name, spec, conversion in fields:
        if name is None:
            continue  # text after the last field
        num_fields += 1
        if name not in allowed or spec or conversion:
            return f"{shown}: has the field {{{name[:40]}}}. {remedy}"
    if num_fields > MAX_FIELDS:
        return f"{shown}: has more than {MAX_FIELDS} fields. Use fewer."
    return None


def _templates(prompting: PromptingSection) -> Iterator[str]:
    if prompting.method == "likelihood" and not prompting.templates:
        yield (
            "prompting.templates: not set. likelihood needs a prompt, such as "
            "'Review: {text}\\nSentiment:'. Write one."
        )

    for template in prompting.templates:
        problem = template_problem(template)
        if problem is not None:
            yield problem

    if prompting.method == "prototypes" and prompting.templates:
        yield (
            "prompting.templates: not used by prompting.method=prototypes. Allowed with likelihood "
            "and generation. Remove them."
        )


def _distinct_words(prompting: PromptingSection) -> Iterator[str]:
    words = list(prompting.verbalizers.values())
    if prompting.method != "none" and len(set(words)) < len(words):
        yield (
            "prompting.verbalizers: two labels have the same words and cannot be distinguished. "
            "Change one."
        )


CHECKS = (_method, _templates, _distinct_words)
