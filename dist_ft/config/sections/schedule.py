"""The section `schedule`: the length of a run and its learning-rate schedule.

`engine.schedule` computes the learning rate of each step.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from dist_ft.config.sections.section import Section


class ScheduleSection(Section):
    """Length of the run, and the learning-rate schedule: a pure function of the step."""

    # No field is part of the run's identity: all may change when a run resumes, to extend it or to
    # end with another learning rate.
    name: Literal["linear", "cosine", "constant"] = Field(
        "cosine", description="Shape of the learning rate after warm-up."
    )
    steps: int | None = Field(
        None,
        ge=0,
        description=(
            "Optimizer steps of the whole run; default: by epochs; 0: evaluate without training."
        ),
    )
    epochs: int | None = Field(
        None, ge=1, description="Passes over the training data; default: by steps."
    )
    warmup_steps: int | None = Field(
        None, ge=0, description="Steps of linear warm-up; default: by warmup_ratio."
    )
    warmup_ratio: float | None = Field(
        None, ge=0, le=1, description="Fraction of all steps that are warm-up; default: 0."
    )
    min_ratio: float = Field(
        0.0, ge=0, le=1, description="Final learning rate as a fraction of the peak."
    )


def _one_length(schedule: ScheduleSection) -> Iterator[str]:
    if schedule.steps is None and schedule.epochs is None:
        yield (
            "schedule.steps: neither steps nor epochs is set. One of them is needed as the length "
            "of the run. Set schedule.steps or schedule.epochs."
        )

    if schedule.steps is not None and schedule.epochs is not None:
        yield (
            f"schedule.steps={schedule.steps}: schedule.epochs={schedule.epochs} is also set. Only "
            "one of them is allowed. Remove the other."
        )


def _one_warmup(schedule: ScheduleSection) -> Iterator[str]:
    if schedule.warmup_steps is not None and schedule.warmup_ratio is not None:
        yield (
            f"schedule.warmup_steps={schedule.warmup_steps}: "
            f"schedule.warmup_ratio={schedule.warmup_ratio} is also set. Only one of them is "
            "allowed. Remove the other."
        )


def _warmup_fits(schedule: ScheduleSection) -> Iterator[str]:
    # With epochs nothing is checked: the number of steps follows from data, which is not read here.
    warmup = schedule.warmup_steps
    steps = schedule.steps
    if warmup is not None and steps is not None and warmup > steps:
        yield (
            f"schedule.warmup_steps={warmup}: longer than the run of schedule.steps={steps}. At "
            f"most {steps} is allowed. Lower it, or use schedule.warmup_ratio."
        )


CHECKS = (_one_length, _one_warmup, _warmup_fits)
