"""The section `evaluation.robustness`: further scores of `dist-ft evaluate`."""

from __future__ import annotations

from pydantic import Field

from dist_ft.config.sections.data import Sources
from dist_ft.config.sections.section import Section


class RobustnessSection(Section):
    """Further scores of `dist-ft evaluate`; the evaluations of a run leave them out."""

    # Not evaluated during a run: each score needs another pass over the held-out data.
    typo_rate: float = Field(
        0.0,
        ge=0,
        le=1,
        description=(
            "Fraction of words that get a typo (letters swapped, dropped, or replaced by an "
            "adjacent key); metrics of such texts are reported next to those of clean ones; 0: "
            "none."
        ),
    )
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of the typos.")
    swaps: str | None = Field(
        None,
        description=(
            "File of names or terms to swap (.csv or .jsonl with the columns first and second), "
            "both ways: reports the fraction of predictions that change and the difference of "
            "scores; default: none."
        ),
    )
    out_of_scope_label: str | None = Field(
        None,
        description=(
            "sequence_classification: label of held-out rows that belong to no other label; they "
            "are detected by the model's confidence (AUROC of its largest probability, "
            "arXiv:1610.02136); default: none."
        ),
    )
    out_of_scope: Sources = Field(
        (), description="sequence_classification: further data that are out of scope."
    )
