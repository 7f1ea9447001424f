"""The evaluation.robustness section: what `dist-ft evaluate` tells of a model besides its metrics."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field

from dist_ft.config.sections.data import Sources
from dist_ft.config.sections.section import Section
from dist_ft.config.sections.task import LABELLED, TaskSection

NOISY = (*LABELLED, "regression", "question_answering")
"""Tasks whose texts can be given typos; of a question's context the answer must stay a part."""


class RobustnessSection(Section):
    """Further scores of `dist-ft evaluate`; a run's own evaluations leave them out."""

    typo_rate: float = Field(
        0.0,
        ge=0,
        le=1,
        description=(
            "Share of words that get a typo (letters swapped, dropped, hit beside); metrics of such texts stand beside "
            "those of clean ones; 0: none."
        ),
    )
    seed: int = Field(0, ge=0, lt=2**63, description="Which words get which typo.")
    swaps: str | None = Field(
        None,
        description=(
            "File of names or terms to swap (.csv or .jsonl with the columns first and second), both ways: share of "
            "predictions that change, gap of scores; none: not asked."
        ),
    )
    out_of_scope_label: str | None = Field(
        None,
        description=(
            "sequence_classification: held-out rows of this label belong to none of the others; they are told by how sure "
            "the model is (AUROC of its largest probability, arXiv:1610.02136); none: no such."
        ),
    )
    out_of_scope: Sources = Field(
        (), description="sequence_classification: further data that are out of scope."
    )


def problems(task: TaskSection, section: RobustnessSection) -> Iterator[str]:
    """Yield a line for each contradiction with the task."""
    where, name = "evaluation.robustness", task.name
    if section.typo_rate and name not in NOISY:
        yield (
            f"{where}.typo_rate={section.typo_rate}: task.name={name} does not use it; allowed with "
            f"{', '.join(NOISY)}; remove it"
        )
    if section.swaps and name not in LABELLED:
        yield (
            f"{where}.swaps={section.swaps}: task.name={name} does not use it; allowed with {', '.join(LABELLED)}; "
            f"remove it"
        )
    for field in ("out_of_scope_label", "out_of_scope"):
        if getattr(section, field) and name != "sequence_classification":
            yield (
                f"{where}.{field}: task.name={name} does not use it; allowed with sequence_classification; remove "
                f"it"
            )
    if section.out_of_scope_label is not None and section.out_of_scope_label in task.labels:
        yield (
            f"{where}.out_of_scope_label={section.out_of_scope_label}: is one of task.labels, so rows of it are in "
            f"scope; another one is allowed; remove it from one of them"
        )
