"""Decoding settings: how text is generated, by evaluations and by commands."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError

from dist_ft.config import renames
from dist_ft.config.sections.section import Section, as_tuple
from dist_ft.core.errors import ConfigError

TEXT_METRICS = (
    "bleu",
    "chrf",
    "rouge1",
    "rouge2",
    "rougeL",
    "exact_match",
    "token_f1",
    "token_error_rate",
    "number_match",
)
"""Metrics that compare generations with their references."""

# Type checkers accept no Literal[*TEXT_METRICS], so the names stand here twice.
TextMetric = Literal[
    "bleu",
    "chrf",
    "rouge1",
    "rouge2",
    "rougeL",
    "exact_match",
    "token_f1",
    "token_error_rate",
    "number_match",
]
USED_BY = {
    "num_beams": "beam",
    "length_penalty": "beam",
    "early_stopping": "beam",
    "temperature": "sample",
    "top_k": "sample",
    "top_p": "sample",
    "min_p": "sample",
}
"""Fields that only one strategy uses."""
SHORT_FORMS = "greedy, beam:4 and sample:0.7, with further fields as in beam:4,length_penalty=0.8"
"""Forms that `parse_strategy` reads."""


class DecodingSection(Section):
    """How text is generated. Generations do not depend on batches, engines and number of workers.

    The model's generation config is ignored, but for its special tokens.
    """

    # No field is part of the identity: generations are looked at, never trained on.
    max_new_tokens: int = Field(
        0, ge=0, description="Maximum length of a generation, in tokens; 0: no generation."
    )
    strategy: Literal["greedy", "beam", "sample"] = Field(
        "greedy",
        description=(
            "greedy: the most probable token each time; beam: beam search with num_beams beams; "
            "sample: sample by probability."
        ),
    )
    num_beams: int = Field(4, ge=2, description="beam: number of beams.")
    length_penalty: float = Field(
        1.0,
        description=(
            "beam: log-probabilities are divided by the length in tokens to this power; above 0 "
            "favors longer generations."
        ),
    )
    early_stopping: bool = Field(
        False,
        description=(
            "beam: stop when num_beams generations are complete; off: when no better one can be "
            "expected."
        ),
    )
    temperature: float = Field(1.0, gt=0, description="sample: logits are divided by it.")
    top_k: int = Field(
        0, ge=0, description="sample: only among the k most probable tokens; 0: all."
    )
    top_p: float = Field(
        1.0,
        gt=0,
        le=1,
        description=(
            "sample: only among the most probable tokens with this total probability "
            "(arXiv:1904.09751); 1: all."
        ),
    )
    min_p: float = Field(
        0.0,
        ge=0,
        lt=1,
        description=(
            "sample: only tokens with at least this fraction of the highest probability "
            "(arXiv:2407.01082); 0: all."
        ),
    )
    repetition_penalty: float = Field(
        1.0,
        gt=0,
        description=(
            "Logits of previous tokens, those of the prompt included, are divided by it if "
            "positive, multiplied if negative (arXiv:1909.05858); 1: no penalty."
        ),
    )
    num_samples: int = Field(
        1,
        ge=1,
        description=(
            "Generations per prompt (beam: the best ones); metrics are computed on the first."
        ),
    )
    choices: Annotated[tuple[str, ...], BeforeValidator(as_tuple)] = Field(
        (),
        description=(
            "The generation is exactly one of these, with any strategy; max_new_tokens must then "
            "only be above 0; empty: free text."
        ),
    )
    seed: int = Field(
        0,
        ge=0,
        lt=2**63,
        description=(
            "sample: random draws follow from it, from the index of the held-out sample, and from "
            "that of the generation among num_samples."
        ),
    )
    batch_size: int = Field(16, ge=1, description="Generations per batch of a worker.")


class GenerationSection(Section):
    """Generations at evaluations, and their metrics; a part of the section `evaluation`."""

    decoding: DecodingSection = Field(
        default_factory=DecodingSection,
        description=(
            "How text is generated from held-out prompts (causal_lm: the tokens before the first "
            "target; seq2seq: the source); with max_new_tokens=0 none is."
        ),
    )
    generate_samples: int = Field(
        0, ge=0, description="Number of held-out samples to generate for; 0: all."
    )
    keep_generations: int = Field(
        20,
        ge=0,
        description=(
            "Number of generations to store in the run's evaluations/, with prompts and references."
        ),
    )
    text_metrics: Annotated[tuple[TextMetric, ...], BeforeValidator(as_tuple)] = Field(
        ("chrf", "exact_match"),
        description=(
            "Metrics of generations: bleu and chrf (sacrebleu, 0 to 100), rouge1, rouge2, rougeL "
            "(F), exact_match, token_f1 (common tokens), token_error_rate (edits / tokens of the "
            "references: word or phoneme error rate), number_match (the last numbers are equal)."
        ),
    )
    text_tokenizer: Literal["13a", "intl", "zh", "char", "none"] = Field(
        "13a",
        description=(
            "Tokenizer of bleu, by its name in sacrebleu; zh and char also apply to rouge and "
            "token_*, which otherwise split at whitespace (rouge: by its own rule, for Latin "
            "letters)."
        ),
    )


# The first part of a short form gives strategy, beams and temperature. The others belong to no
# strategy: they come from the config or from options of a command.
_NOT_IN_SHORT_FORM = (
    "strategy",
    "max_new_tokens",
    "choices",
    "batch_size",
    "seed",
    "num_beams",
    "temperature",
)


def format_strategy(section: DecodingSection) -> str:
    """Return a strategy in the short form that `parse_strategy` reads."""
    heads = {
        "greedy": "greedy",
        "beam": f"beam:{section.num_beams}",
        "sample": f"sample:{section.temperature:g}",
    }

    # In the order of the schema, so that equal strategies have equal texts.
    parts = [heads[section.strategy]]
    for field in type(section).model_fields:
        if field not in _NOT_IN_SHORT_FORM and not section.is_default(field):
            parts.append(f"{field}={getattr(section, field)}")

    return ",".join(parts)


def parse_strategy(
    text: str, base: DecodingSection | None = None, source: str = "--strategy", **fields: Any
) -> DecodingSection:
    """Return the strategy in `text`.

    Args:
        text: greedy, beam:4 or sample:0.7, and further fields as in beam:4,length_penalty=0.8.
        base: gives the fields that belong to no strategy (length, choices, seed), unless `fields`
            or the text have them.
        source: name of `text` in errors.
        fields: fields of the section.

    Raises:
        ConfigError: `text` is not a strategy.
    """
    # Fields of a strategy do not come from `base`: with another strategy in the text they would be
    # contradictions.
    values: dict[str, Any] = {}
    if base is not None:
        for field in type(base).model_fields:
            if field not in USED_BY and field != "strategy":
                values[field] = getattr(base, field)

    head, *assignments = text.split(",")
    name, _, number = head.partition(":")
    values |= {**fields, "strategy": name}
    if number:
        # Any other strategy has no number: "greedy" is not a field, hence an error.
        number_field = {"beam": "num_beams", "sample": "temperature"}.get(name, "greedy")
        values[number_field] = number

    for assignment in assignments:
        field, equals, value = assignment.partition("=")
        field = field.strip()
        renamed = renames.RUN.field_problem(f"evaluation.decoding.{field}")
        if renamed is not None:
            raise ConfigError([f"{source}={text}: {renamed}"], source)

        # Choices are free texts, which may contain commas. Whatever is no field becomes a key that
        # the section does not have, so that pydantic's error names it.
        is_field = bool(equals) and field not in ("strategy", "choices")
        values[field if is_field else assignment] = value

    try:
        section = DecodingSection.model_validate(values)
    except ValidationError as error:
        raise ConfigError([_invalid_strategy(text, source, error)], source) from error

    problems = list(decoding_problems(section, source))
    if problems:
        raise ConfigError(problems, source)
    return section


def _invalid_strategy(text: str, source: str, error: ValidationError) -> str:
    """Return the line for a text that is not a strategy."""
    first = error.errors()[0]
    field = ".".join(map(str, first["loc"]))
    message = first["msg"]
    reason = f"{field}: {message[:1].lower()}{message[1:]}"
    return (
        f"{source}={text}: not a decoding strategy ({reason}). Allowed: {SHORT_FORMS}. Correct it."
    )


def decoding_problems(section: DecodingSection, path: str) -> Iterator[str]:
    """Yield a line for each contradiction among the fields of the section at `path`."""
    for field, strategy in USED_BY.items():
        if section.strategy != strategy and not section.is_default(field):
            yield (
                f"{path}.{field}={getattr(section, field)}: not used by "
                f"strategy={section.strategy}. Allowed with {strategy}. Remove it, or set "
                f"strategy={strategy}."
            )

    # Greedy search has one result, a beam search its beams. With choices it has no more than those.
    limit = {"greedy": 1, "beam": section.num_beams}.get(section.strategy, section.num_samples)
    if section.choices and section.strategy == "beam":
        limit = min(limit, len(section.choices))

    if section.num_samples > limit:
        verb = "is" if limit == 1 else "are"
        yield (
            f"{path}.num_samples={section.num_samples}: strategy={section.strategy} has fewer "
            f"generations per prompt here. At most {limit} {verb} allowed. Lower it, or set "
            "strategy=sample."
        )

    if not all(section.choices) or len(set(section.choices)) < len(section.choices):
        yield (f"{path}.choices: one is empty or listed twice. Allowed: distinct texts. Remove it.")

    if section.choices and not section.max_new_tokens:
        yield (
            f"{path}.choices: max_new_tokens=0 generates nothing. Needed: a number above 0. Set "
            "it, or remove choices."
        )
