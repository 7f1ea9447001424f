"""The task section: what the model is to do, hence which head it has, which columns are read, what is minimised."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, PositiveFloat

from dist_ft.config.sections.minimum_risk import RiskSection
from dist_ft.config.sections.section import Identity, Section

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
LABELLED = ("sequence_classification", "multi_label", "token_classification")
"""Tasks that choose among labels."""

METRICS: dict[str, tuple[str, ...]] = {
    "causal_lm": ("perplexity",),
    "sequence_classification": ("accuracy", "f1_macro", "f1_weighted", "mcc", "calibration_error"),
    "multi_label": ("accuracy", "f1_micro", "f1_macro"),
    "regression": ("mse", "mae", "pearson", "spearman"),
    "token_classification": ("accuracy", "precision", "recall", "f1"),
    "question_answering": ("exact_match", "f1"),
    "seq2seq": ("perplexity", "accuracy"),
    "masked_lm": ("perplexity", "accuracy"),
    "embedding": ("recall@1", "recall@5", "recall@10", "mrr", "ndcg@10"),
}
"""What evaluations of each task tell besides the loss."""


def _as_labels(value: object) -> object:
    """Accept numbers for names of labels."""
    return tuple(str(item) for item in value) if isinstance(value, list | tuple) else value


class ColumnsSection(Section):
    """Names of the columns a task reads; those of causal_lm stand in data.fields."""

    text: str = Identity(
        "text",
        description=(
            "Text to classify, score, mask or embed (sequence_classification, multi_label, regression, masked_lm, "
            "embedding)."
        ),
    )
    pair: str | None = Identity(
        None,
        description=(
            "Second text: of a pair to classify or score (none: single texts), or what `text` belongs to (embedding; "
            "none: positive)."
        ),
    )
    label: str = Identity(
        "label", description="Label; multi_label: a list of labels; regression: a number."
    )
    tokens: str = Identity("tokens", description="token_classification: list of words.")
    tags: str = Identity("tags", description="token_classification: list of tags, one a word.")
    question: str = Identity("question", description="question_answering: the question.")
    context: str = Identity(
        "context", description="question_answering: the text that holds the answer."
    )
    answers: str = Identity(
        "answers",
        description=(
            "question_answering: {text: [...], answer_start: [...]} (characters of the context); empty lists: no answer."
        ),
    )
    source: str = Identity("source", description="seq2seq: what is given.")
    target: str = Identity("target", description="seq2seq: what is to be made of it.")


class TaskSection(Section):
    """What the model is to do."""

    name: TaskName = Identity(
        "causal_lm",
        description=(
            "causal_lm: continue text, answer, chat; sequence_classification: one label a text or pair of texts (relations "
            "too, with markers in the text); multi_label: any number of labels; regression: a number; "
            "token_classification: a tag a word; question_answering: a span of a text; seq2seq: a text from a text, by an "
            "encoder-decoder; "
            "masked_lm: masked tokens; embedding: vectors that are near for texts that belong together."
        ),
    )
    objective: Literal["likelihood", "minimum_risk"] = Field(
        "likelihood",
        description=(
            "causal_lm, seq2seq: what is learned from the targets: their likelihood, or (minimum_risk) the texts the model "
            "makes itself, as task.risk says; other tasks: likelihood."
        ),
    )
    risk: RiskSection = Field(default_factory=RiskSection, description="objective minimum_risk.")
    columns: ColumnsSection = Field(default_factory=ColumnsSection, description="Column names.")
    labels: Annotated[tuple[str, ...], BeforeValidator(_as_labels)] = Identity(
        (),
        description=(
            "Labels or tags in the order of the head's outputs; empty: those of the training data, sorted."
        ),
    )
    new_head: bool = Identity(
        False,
        description=(
            "Begin a new head where the model's own has other labels; off: that is an error."
        ),
    )
    grow_head: bool = Identity(
        False,
        description=(
            "Keep the model's head and add rows, drawn by run.seed, for labels it has not; off: see new_head."
        ),
    )
    class_weights: tuple[PositiveFloat, ...] = Field(
        (),
        description=(
            "sequence_classification, token_classification: what a sample of each label counts, in their order (King, Zeng "
            "2001); empty: 1."
        ),
    )
    focal_gamma: float = Field(
        0.0,
        ge=0,
        description=(
            "sequence_classification, multi_label, token_classification: losses are scaled by (1 - probability of the "
            "label) to this power (focal loss, Lin et al., arXiv:1708.02002); 0: plain cross-entropy."
        ),
    )
    stride: int = Identity(
        64,
        ge=0,
        description=(
            "question_answering: tokens that neighbouring windows of a long context share."
        ),
    )
    mask_probability: float = Identity(
        0.15,
        gt=0,
        lt=1,
        description=(
            "masked_lm: share of tokens to be told; of these 80 % are masked, 10 % replaced, 10 % kept (BERT, "
            "arXiv:1810.04805)."
        ),
    )
    temperature: float = Field(
        0.05,
        gt=0,
        description=(
            "embedding: cosines to all texts of the micro-batch are divided by it (InfoNCE, arXiv:1807.03748)."
        ),
    )
    pooling: Literal["mean", "first", "last"] = Identity(
        "mean", description=("embedding: which token vectors make the text's.")
    )
