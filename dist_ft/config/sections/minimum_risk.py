"""Minimum risk training: what is minimised in place of the likelihood's loss, and over which texts."""

from __future__ import annotations

from pydantic import Field

from dist_ft.config.sections.decoding import TextMetric
from dist_ft.config.sections.section import Section


class RiskSection(Section):
    """Minimum risk training (Shen et al. 2016, arXiv:1512.02433): the expected risk of texts the model itself makes.

    For each sample texts are drawn, and the reference joins them; of these different texts each has the share
    softmax(alpha x its log-probability), and the sum of shares x risks is minimised, the mean over samples.
    """

    metric: TextMetric = Field(
        "chrf",
        description=(
            "The risk of a text is 1 - this metric of it (of 0 to 1; bleu of the sentence), or token_error_rate itself."
        ),
    )
    candidates: int = Field(
        4,
        ge=1,
        description=(
            "Texts drawn a sample and step, by run.seed, step and place; equal ones count once."
        ),
    )
    max_new_tokens: int = Field(64, ge=1, description="Longest text drawn, in tokens.")
    temperature: float = Field(
        1.0, gt=0, description="Logits are divided by it when texts are drawn."
    )
    alpha: float = Field(
        0.005,
        gt=0,
        description=(
            "Sharpness of the shares: 0 would make all alike, 1 takes the model's own probabilities."
        ),
    )
    likelihood_weight: float = Field(
        0.0,
        ge=0,
        description=("The reference's cross-entropy a token, times this, is added; 0: risk alone."),
    )
