"""How texts are made, at evaluations and by commands, and by which metrics they are compared with references."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError

from dist_ft.config.sections.section import Section
from dist_ft.core.errors import ConfigError

MAKERS = ("causal_lm", "seq2seq")
"""Tasks whose models make texts."""
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
"""What can be told of texts beside their references."""
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
"""Fields and the strategy that uses them."""
FORMS = "greedy, beam:4 and sample:0.7 are, with more as in beam:4,length_penalty=0.8"


def _as_tuple(value: object) -> object:
    """Accept one text for a list of one."""
    return (value,) if isinstance(value, str) else value


class DecodingSection(Section):
    """How a model makes a text. Whatever makes it, texts do not depend on batches, engines and the number of workers.

    What the model's own generation config says of strategy counts nothing; what it says of special tokens does.
    """

    max_new_tokens: int = Field(0, ge=0, description="Longest text, in tokens; 0: none is made.")
    strategy: Literal["greedy", "beam", "sample"] = Field(
        "greedy",
        description=(
            "greedy: the likeliest token each time; beam: the likeliest of the texts that num_beams at a time lead to; "
            "sample: drawn by probability."
        ),
    )
    num_beams: int = Field(4, ge=2, description="beam: texts that are followed at once.")
    length_penalty: float = Field(
        1.0,
        description=(
            "beam: log-probabilities are divided by the length in tokens to this power; above 0 longer texts gain."
        ),
    )
    early_stopping: bool = Field(
        False,
        description=(
            "beam: end once num_beams texts are complete; else once no better one is to be expected."
        ),
    )
    temperature: float = Field(1.0, gt=0, description="sample: logits are divided by it.")
    top_k: int = Field(0, ge=0, description="sample: only among the k likeliest tokens; 0: all.")
    top_p: float = Field(
        1.0,
        gt=0,
        le=1,
        description=(
            "sample: only among the likeliest tokens that make up this share (arXiv:1904.09751); 1: all."
        ),
    )
    min_p: float = Field(
        0.0,
        ge=0,
        lt=1,
        description=(
            "sample: only tokens with this share of the likeliest one's probability (arXiv:2407.01082); 0: all."
        ),
    )
    repetition_penalty: float = Field(
        1.0,
        gt=0,
        description=(
            "Logits of tokens that were there already, in the prompt too, are divided by it where positive, multiplied "
            "where negative (arXiv:1909.05858); 1: none."
        ),
    )
    num_samples: int = Field(
        1,
        ge=1,
        description=("Texts of each prompt (beam: the best ones); metrics are of the first."),
    )
    choices: Annotated[tuple[str, ...], BeforeValidator(_as_tuple)] = Field(
        (),
        description=(
            "The text is exactly one of these, whatever the strategy; max_new_tokens then only says that texts are made. "
            "Empty: any text."
        ),
    )
    seed: int = Field(
        0,
        ge=0,
        lt=2**63,
        description=(
            "sample: draws follow from it, the sample's number among the held-out ones, and which of num_samples it is."
        ),
    )
    batch_size: int = Field(16, ge=1, description="Generations per batch of a worker.")


class TextsSection(Section):
    """Texts made at evaluations, and what is told of them; a part of the section evaluation."""

    decoding: DecodingSection = Field(
        default_factory=DecodingSection,
        description=(
            "How texts are made from held-out prompts (causal_lm: the tokens before the first that is learned; seq2seq: "
            "the source); with max_new_tokens=0 none are."
        ),
    )
    generate_samples: int = Field(
        0, ge=0, description="Texts are made of the first so many held-out samples; 0: all."
    )
    keep_generations: int = Field(
        20,
        ge=0,
        description=(
            "The first so many texts are kept in the run's evaluations/, with prompts and references."
        ),
    )
    text_metrics: Annotated[tuple[TextMetric, ...], BeforeValidator(_as_tuple)] = Field(
        ("chrf", "exact_match"),
        description=(
            "Metrics of texts: bleu and chrf (sacrebleu, 0 to 100), rouge1, rouge2, rougeL (F), exact_match, token_f1 "
            "(tokens in common), token_error_rate (edits / tokens of the references: word or phoneme error rate), "
            "number_match (the last numbers are equal)."
        ),
    )
    text_tokenizer: Literal["13a", "intl", "zh", "char", "none"] = Field(
        "13a",
        description=(
            "Tokens of bleu, as sacrebleu names its tokenizers; with zh and char those of rouge and token_* too, which "
            "else split at blanks (rouge: by its own rule, for Latin letters)."
        ),
    )


def short_form(section: DecodingSection) -> str:
    """Return a strategy in the short form `parse` reads."""
    first = {
        "greedy": "greedy",
        "beam": f"beam:{section.num_beams}",
        "sample": f"sample:{section.temperature:g}",
    }
    left = {
        name: getattr(section, name)
        for name, field in type(section).model_fields.items()
        if name
        not in ("strategy", "max_new_tokens", "choices", "batch_size", "seed", "num_beams", "temperature")
        and getattr(section, name) != field.default
    }
    return ",".join([first[section.strategy], *(f"{name}={value}" for name, value in left.items())])


def parse(
    text: str, base: DecodingSection | None = None, where: str = "--strategy", **fields: Any
) -> DecodingSection:
    """Return the strategy in `text`: greedy, beam:4 or sample:0.7, and further fields as in beam:4,length_penalty=0.8.

    What belongs to no strategy (length, choices, seed) is `base`'s, unless `fields` or the text say otherwise. Raises
    ConfigError for anything else.
    """
    kept = (
        {}
        if base is None
        else {
            name: getattr(base, name)
            for name in type(base).model_fields
            if name not in USED_BY and name != "strategy"
        }
    )
    first, *others = text.split(",")
    name, _, number = first.partition(":")
    found: dict[str, Any] = {**kept, **fields, "strategy": name}
    if number:
        found[{"beam": "num_beams", "sample": "temperature"}.get(name, "greedy")] = number
    for other in others:
        field, equals, value = other.partition("=")
        found[
            field.strip() if equals and field.strip() not in ("strategy", "choices") else other
        ] = value
    try:
        section = DecodingSection.model_validate(found)
    except ValidationError as error:
        problem = error.errors()[0]
        what = f"{'.'.join(map(str, problem['loc']))}: {problem['msg'][:1].lower()}{problem['msg'][1:]}"
        raise ConfigError(
            [f"{where}={text}: is no way to make texts ({what}); {FORMS}; correct it"], where
        ) from error
    problems = list(contradictions(section, where))
    if problems:
        raise ConfigError(problems, where)
    return section


def contradictions(section: DecodingSection, where: str) -> Iterator[str]:
    """Yield a line for each contradiction among the fields of `section`, whose name is `where`."""
    for field, strategy in USED_BY.items():
        value = getattr(section, field)
        if section.strategy != strategy and value != type(section).model_fields[field].default:
            yield (
                f"{where}.{field}={value}: strategy={section.strategy} does not use it; only {strategy} does; "
                f"remove it, or set strategy={strategy}"
            )
    most = {"greedy": 1, "beam": section.num_beams}.get(section.strategy, section.num_samples)
    if section.choices and section.strategy == "beam":
        most = min(most, len(section.choices))
    if section.num_samples > most:
        yield (
            f"{where}.num_samples={section.num_samples}: strategy={section.strategy} makes fewer texts of a prompt "
            f"here; at most {most} {'is' if most == 1 else 'are'} allowed; lower it, or set strategy=sample"
        )
    if not all(section.choices) or len(set(section.choices)) < len(section.choices):
        yield (
            f"{where}.choices: one is empty or stands there twice; different texts are allowed; remove it"
        )
    if section.choices and not section.max_new_tokens:
        yield (
            f"{where}.choices: with max_new_tokens=0 no text is made; a number above 0 is needed; set it, or remove "
            f"choices"
        )
