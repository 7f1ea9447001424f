"""The section `task`: what the model does, hence its head, columns, loss and metrics."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import (
    BeforeValidator,
    Field,
    PlainSerializer,
    PositiveFloat,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)

from dist_ft.config.sections.decoding import TextMetric
from dist_ft.config.sections.section import Identity, Section
from dist_ft.config.task_facts import IMPORT_PATH, TASKS, task_class

# The keys of TASKS. Type checkers need the names themselves.
TaskName = Literal[
    "causal_lm",
    "sequence_classification",
    "multi_label",
    "regression",
    "token_classification",
    "question_answering",
    "seq2seq",
    "masked_lm",
    "embedding",
]


def _accept_own_task(value: object, validate: ValidatorFunctionWrapHandler) -> object:
    """Accept the import path of a class, which is imported when it is used."""
    # Only its form is checked here: validating a stored config must not import code.
    if isinstance(value, str) and IMPORT_PATH.fullmatch(value):
        return value
    return validate(value)


def _as_labels(value: object) -> object:
    """Accept numbers as names of labels."""
    if not isinstance(value, list | tuple):
        return value
    return tuple(str(item) for item in value)


class RiskSection(Section):
    """Minimum risk training (Shen et al. 2016, arXiv:1512.02433): minimize the expected risk.

    Candidates are sampled for each sample, and the reference is added to them. Each distinct
    candidate has the probability softmax(alpha x its log-probability) among them. The sum of
    probabilities x risks is minimized, as the mean over samples.
    """

    metric: TextMetric = Field(
        "chrf",
        description=(
            "The risk of a candidate is 1 - this metric (from 0 to 1; bleu of the sentence), or "
            "token_error_rate itself."
        ),
    )
    candidates: int = Field(
        4,
        ge=1,
        description=(
            "Candidates to sample per sample and step, by run.seed, step and position; equal ones "
            "count once."
        ),
    )
    max_new_tokens: int = Field(64, ge=1, description="Maximum length of a candidate, in tokens.")
    temperature: float = Field(
        1.0, gt=0, description="Temperature for sampling candidates: logits are divided by it."
    )
    alpha: float = Field(
        0.005,
        gt=0,
        description=(
            "Sharpness of the candidates' probabilities: 0 would make all equal, 1 takes those of "
            "the model."
        ),
    )
    likelihood_weight: float = Field(
        0.0,
        ge=0,
        description="Weight of the reference's cross-entropy per token in the loss; 0: risk alone.",
    )


class ColumnsSection(Section):
    """Names of the columns that a task reads; data.fields has those of causal_lm."""

    text: str = Identity(
        "text",
        description=(
            "Text to classify, score, mask or embed (sequence_classification, multi_label, "
            "regression, masked_lm, embedding)."
        ),
    )
    pair: str | None = Identity(
        None,
        description=(
            "Second text of a pair to classify or score (default: single texts), or the positive "
            "for `text` (embedding; default: positive)."
        ),
    )
    label: str = Identity(
        "label", description="Label; multi_label: a list of labels; regression: a number."
    )
    tokens: str = Identity("tokens", description="token_classification: list of words.")
    tags: str = Identity("tags", description="token_classification: list of tags, one per word.")
    question: str = Identity("question", description="question_answering: the question.")
    context: str = Identity(
        "context", description="question_answering: the text that contains the answer."
    )
    answers: str = Identity(
        "answers",
        description=(
            "question_answering: {text: [...], answer_start: [...]} (characters of the context); "
            "empty lists: no answer."
        ),
    )
    source: str = Identity("source", description="seq2seq: the source text.")
    target: str = Identity("target", description="seq2seq: the target text.")


class TaskSection(Section):
    """What the model does."""

    # Serialized as a plain text: pydantic warns of an import path, which is none of the literals.
    name: Annotated[TaskName, WrapValidator(_accept_own_task), PlainSerializer(str)] = Identity(
        "causal_lm",
        description=(
            "causal_lm: continue text, answer, chat; sequence_classification: one label per text "
            "or pair of texts (relations too, with markers in the text); multi_label: any number "
            "of labels; regression: a number; token_classification: a tag per word; "
            "question_answering: a span of a text; seq2seq: a text from a text, by an "
            "encoder-decoder; masked_lm: masked tokens; embedding: vectors that are close for "
            "related texts. Or the import path of your own class, such as mypackage.tasks:MyTask."
        ),
    )
    # Operational: a run may continue with minimum risk, on the same model and the same samples.
    objective: Literal["likelihood", "minimum_risk"] = Field(
        "likelihood",
        description=(
            "causal_lm, seq2seq: maximize the likelihood of the targets, or (minimum_risk) "
            "minimize the risk of the model's own generations, see task.risk; other tasks: "
            "likelihood."
        ),
    )
    risk: RiskSection = Field(default_factory=RiskSection, description="objective minimum_risk.")
    columns: ColumnsSection = Field(default_factory=ColumnsSection, description="Column names.")
    labels: Annotated[tuple[str, ...], BeforeValidator(_as_labels)] = Identity(
        (),
        description=(
            "Labels or tags in the order of the head's outputs; empty: those of the training data, "
            "sorted."
        ),
    )
    new_head: bool = Identity(
        False,
        description=(
            "Initialize a new head if the model's own has other labels; off: that is an error."
        ),
    )
    grow_head: bool = Identity(
        False,
        description=(
            "Keep the model's head and add rows, initialized by run.seed, for new labels; off: see "
            "new_head."
        ),
    )
    # Weights of the loss change neither the head nor the samples, unlike the labels and new_head.
    class_weights: tuple[PositiveFloat, ...] = Field(
        (),
        description=(
            "sequence_classification, token_classification: loss weight of each label, in their "
            "order (King, Zeng 2001); empty: 1."
        ),
    )
    focal_gamma: float = Field(
        0.0,
        ge=0,
        description=(
            "sequence_classification, multi_label, token_classification: losses are scaled by (1 - "
            "probability of the label) to this power (focal loss, Lin et al., arXiv:1708.02002); "
            "0: plain cross-entropy."
        ),
    )
    stride: int = Identity(
        64,
        ge=0,
        description="question_answering: tokens that adjacent windows of a long context share.",
    )
    mask_probability: float = Identity(
        0.15,
        gt=0,
        lt=1,
        description=(
            "masked_lm: probability that a token is a target; 80 % of targets are masked, 10 % "
            "replaced, 10 % unchanged (BERT, arXiv:1810.04805)."
        ),
    )
    temperature: float = Field(
        0.05,
        gt=0,
        description=(
            "embedding: cosines to all texts of the micro-batch are divided by it (InfoNCE, "
            "arXiv:1807.03748)."
        ),
    )
    pooling: Literal["mean", "first", "last"] = Identity(
        "mean", description="embedding: how token vectors are pooled into the vector of a text."
    )


TASK_FIELDS = (
    "labels",
    "new_head",
    "grow_head",
    "class_weights",
    "focal_gamma",
    "stride",
    "mask_probability",
    "temperature",
    "pooling",
)
"""Fields that some tasks use only (`TaskFacts.fields`)."""


def _unused_fields(task: TaskSection) -> Iterator[str]:
    # A user's own task lists its fields as well; the message can only name tasks of dist_ft.
    used = task_class(task.name).fields
    for field in TASK_FIELDS:
        if field not in used and not task.is_default(field):
            tasks = [name for name in TASKS if field in task_class(name).fields]
            yield (
                f"task.{field}: not used by task.name={task.name}. Allowed with "
                f"{', '.join(tasks)}. Remove it, or set task.name."
            )


def _head(task: TaskSection) -> Iterator[str]:
    if task.grow_head and task.new_head:
        yield (
            "task.grow_head: task.new_head initializes another head, so there is none to grow. "
            "Only one of them is allowed. Remove the other."
        )


def _labels(task: TaskSection) -> Iterator[str]:
    if len(set(task.labels)) < len(task.labels):
        duplicate = next(label for label in task.labels if task.labels.count(label) > 1)
        yield (f"task.labels: {duplicate} is listed twice. Allowed: each label once. Remove one.")
    if len(task.labels) == 1:
        yield (
            f"task.labels=[{task.labels[0]}]: a single label. At least two are needed. Add the "
            "others."
        )


def _risk(task: TaskSection) -> Iterator[str]:
    if task.objective != "minimum_risk" and task.risk != RiskSection():
        yield (
            f"task.risk: not used by task.objective={task.objective}. Allowed with minimum_risk. "
            "Set that, or remove it."
        )


CHECKS = (_unused_fields, _head, _labels, _risk)
