"""The section `evaluation`: held-out data, when it is evaluated, and generations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from dist_ft.config.sections.data import Sources
from dist_ft.config.sections.decoding import GenerationSection, decoding_problems
from dist_ft.config.sections.robustness import RobustnessSection


class EvaluationSection(GenerationSection):
    """Loss and metrics on held-out data, and generations for it."""

    # Operational, though the fields of a source are marked: held-out data may change in a resume.
    data: Sources = Field(
        (),
        description="Held-out data, in the format of the training data; empty: no evaluation.",
    )
    weights: Literal["trained", "ema"] = Field(
        "trained",
        description=(
            "Weights to evaluate and, by default, to export: the trained ones, or their average "
            "(tuning.ema_decay)."
        ),
    )
    every_steps: int = Field(0, ge=0, description="Steps between evaluations; 0: not by steps.")
    every_epochs: int = Field(0, ge=0, description="Epochs between evaluations; 0: not by epochs.")
    patience: int = Field(
        0,
        ge=0,
        description=(
            "Early stopping: the run ends after this number of evaluations in a row without an "
            "improvement (checkpoint.best_by); 0: never."
        ),
    )
    at_start: bool = Field(True, description="Evaluate before step 1.")
    at_end: bool = Field(True, description="Evaluate after the last step.")
    max_samples: int = Field(0, ge=0, description="Number of samples to evaluate; 0: all.")
    robustness: RobustnessSection = Field(
        default_factory=RobustnessSection, description="Robustness scores of `dist-ft evaluate`."
    )

    @property
    def is_repeated(self) -> bool:
        """Whether the run evaluates by steps or epochs."""
        return bool(self.every_steps or self.every_epochs)


def _patience(evaluation: EvaluationSection) -> Iterator[str]:
    if evaluation.patience and not (evaluation.data and evaluation.is_repeated):
        yield (
            f"evaluation.patience={evaluation.patience}: the run has no repeated evaluations. "
            "Needs evaluation.data, and evaluation.every_steps or every_epochs. Set them."
        )


def _needs_data(evaluation: EvaluationSection) -> Iterator[str]:
    # at_start and at_end are on by default, so they are no sign of a mistake.
    for field in ("every_epochs", "every_steps"):
        value = getattr(evaluation, field)
        if value and not evaluation.data:
            yield (
                f"evaluation.{field}={value}: there is no data to evaluate on. Needs "
                f"evaluation.data. Set it, or remove {field}."
            )


def _decoding(evaluation: EvaluationSection) -> Iterator[str]:
    yield from decoding_problems(evaluation.decoding, "evaluation.decoding")


def _generation(evaluation: EvaluationSection) -> Iterator[str]:
    max_new_tokens = evaluation.decoding.max_new_tokens
    if max_new_tokens:
        if not evaluation.data:
            yield (
                f"evaluation.decoding.max_new_tokens={max_new_tokens}: there are no prompts. Needs "
                "evaluation.data. Set it."
            )

        return

    # Settings of generations without any are most likely a forgotten max_new_tokens.
    for field in GenerationSection.model_fields:
        if field != "decoding" and not evaluation.is_default(field):
            yield (
                f"evaluation.{field}={getattr(evaluation, field)}: no text is generated. Needs "
                "evaluation.decoding.max_new_tokens. Set that, or remove it."
            )


CHECKS = (_patience, _needs_data, _decoding, _generation)
