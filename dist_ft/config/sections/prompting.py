"""The prompting section: how a model does a task by what it already knows, without a head of its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from dist_ft.config.sections.section import Identity, Section
from dist_ft.config.sections.task import TaskSection

ALLOWED = {
    "likelihood": ("sequence_classification", "causal language models"),
    "generation": ("token_classification", "causal language models"),
    "prototypes": ("sequence_classification", "encoders and causal language models"),
}
"""The task each method is for, and the models that can."""


def _as_templates(value: object) -> object:
    """Accept one template for a list of one."""
    return (value,) if isinstance(value, str) else value


def _as_words(value: Any) -> Any:
    """Accept numbers for names of labels."""
    return (
        {str(label): words for label, words in value.items()} if isinstance(value, dict) else value
    )


class PromptingSection(Section):
    """How a model is asked for labels, in place of a head."""

    method: Literal["none", "likelihood", "generation", "prototypes"] = Identity(
        "none",
        description=(
            "none: the task's head; likelihood: sequence_classification by how probable a causal model finds each label's "
            "words after a prompt (trainable too: those words are learned); generation: token_classification by entities a "
            "causal model writes down; prototypes: sequence_classification by the nearest mean vector of some examples. "
            "`evaluate` asks models that have a head for the task by that head."
        ),
    )
    templates: Annotated[tuple[str, ...], BeforeValidator(_as_templates)] = Identity(
        (),
        description=(
            "What is asked, with {text} (and {pair}) where the row's texts stand, and other braces written twice; no blank "
            "at the end. Several are compared by evaluate; the first is trained with. Empty: for generation one of its "
            "own."
        ),
    )
    verbalizers: Annotated[dict[str, str], BeforeValidator(_as_words)] = Identity(
        {},
        description=(
            "likelihood: label -> the words that stand for it, with the blank before them; generation: kind of entity -> "
            "what prompts call it; empty: the label, '_' as blanks."
        ),
    )
    shots: int = Identity(
        0,
        ge=0,
        description=(
            "Answered examples before each prompt (few-shot), drawn from data.train; prototypes: examples a label that "
            "make its vector, 0: all."
        ),
    )
    shots_by: Literal["label", "all"] = Identity(
        "label", description=("likelihood: so many shots of each label, or in all.")
    )
    separator: str = Identity(
        "\n\n", description="What stands between two examples, and before the row asked for."
    )
    seed: int = Identity(
        0, ge=0, lt=2**63, description="Which examples are drawn, and their order."
    )
    normalize: Literal["sum", "mean"] = Identity(
        "sum",
        description=(
            "likelihood: log-probabilities of a label's tokens are added, or their mean is taken (labels of unequal "
            "length)."
        ),
    )
    calibrate: bool = Identity(
        False,
        description=(
            "likelihood: divide a label's probability by that after prompts without content (contextual calibration, "
            "arXiv:2102.09690)."
        ),
    )
    max_new_tokens: int = Field(64, ge=1, description="generation: longest answer, in tokens.")


def of_model(task: TaskSection, prompting: PromptingSection) -> TaskSection:
    """Return the task the model itself is loaded for: a prompted one continues text."""
    if prompting.method in ("likelihood", "generation"):
        return TaskSection()
    return TaskSection(name="embedding") if prompting.method == "prototypes" else task


def untrainable(prompting: PromptingSection) -> Iterator[str]:
    """Yield a line if what the section asks for has nothing that learns."""
    if prompting.method in ("generation", "prototypes"):
        yield (
            f"prompting.method={prompting.method}: nothing of it learns; `dist-ft evaluate` uses it, and training "
            f"takes none or likelihood; evaluate, or set another method"
        )


def problems(task: TaskSection, prompting: PromptingSection) -> Iterator[str]:
    """Yield a line for each contradiction within the section, and with the task."""
    method = prompting.method
    if method == "none":
        if prompting != PromptingSection():
            yield (
                "prompting.method=none: the other fields of prompting are set, and nothing uses them; likelihood, "
                "generation and prototypes do; set one of them, or remove the section"
            )
        return
    wanted, _ = ALLOWED[method]
    if task.name != wanted:
        yield (
            f"prompting.method={method}: task.name={task.name} does not use it; allowed with task.name={wanted}; "
            f"set that, or remove it"
        )
    for field in ("focal_gamma", "new_head"):
        if getattr(task, field) != TaskSection.model_fields[field].default:
            yield f"task.{field}: with prompting.method={method} there is no head; allowed without; remove it"
    if method == "likelihood" and not prompting.templates:
        yield (
            "prompting.templates: none is given; likelihood needs what to ask, such as "
            "'Review: {text}\\nSentiment:'; write one"
        )
    if prompting.templates and method == "prototypes":
        yield (
            "prompting.templates: prompting.method=prototypes does not use them; allowed with likelihood and "
            "generation; remove them"
        )
    for number, template in enumerate(prompting.templates):
        yield from _template(
            f"prompting.templates.{number}", template, task.columns.pair is not None
        )
    unknown = (
        sorted(set(prompting.verbalizers) - set(task.labels))
        if task.labels and method == "likelihood"
        else []
    )
    missing = sorted(set(task.labels) - set(prompting.verbalizers)) if prompting.verbalizers else []
    if unknown:
        yield (
            f"prompting.verbalizers.{unknown[0]}: is no label of task.labels; allowed: {', '.join(task.labels)}; "
            f"correct one of them"
        )
    if missing and method == "likelihood":
        yield (
            f"prompting.verbalizers: {missing[0]} of task.labels has no words; one entry for each label, or none at "
            f"all, is allowed; add it"
        )
    if len(set(prompting.verbalizers.values())) < len(prompting.verbalizers):
        yield "prompting.verbalizers: two labels have the same words, which tells nothing apart; change one"


def _template(path: str, template: str, pairs: bool) -> Iterator[str]:
    """Yield what is wrong with one template."""
    try:
        told = [
            template.format(text=text, pair=pair)
            for text, pair in (("", ""), ("\0", ""), ("", "\0"))
        ]
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        yield (
            f"{path}: is not a template ({type(error).__name__}: {error}); {{text}} and {{pair}} are allowed; write "
            f"other braces twice"
        )
        return
    if told[0] == told[1]:
        yield f"{path}: has no place for the row's text; {{text}} is needed; add it"
    if pairs and told[0] == told[2]:
        yield f"{path}: has no place for the second text (task.columns.pair); {{pair}} is needed; add it"
    if not pairs and told[0] != told[2]:
        yield f"{path}: has a place for a second text, and task.columns.pair names none; set it, or remove {{pair}}"
