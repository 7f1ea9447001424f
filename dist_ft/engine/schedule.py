"""The learning rate as a pure function of the step, without state to save or restore."""

from __future__ import annotations

import math
from collections.abc import Callable

from dist_ft.config.schema import ScheduleSection, TuningSection


def warmup_steps(section: ScheduleSection, total_steps: int) -> int:
    """Return the number of warm-up steps of a run of `total_steps`."""
    if section.warmup_steps is not None:
        return section.warmup_steps

    # Rounded, since 0.07 * 100 is slightly more than 7.
    steps = (section.warmup_ratio or 0.0) * total_steps
    return math.ceil(round(steps, 6))


def learning_rate_factor(section: ScheduleSection, step: int, total_steps: int) -> float:
    """Return learning rate / peak at `step` (from 0): warm-up to 1, then decay to `min_ratio`."""
    # The first step has a rate above zero, and the first step after the warm-up has the peak.
    warmup = warmup_steps(section, total_steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if section.name == "constant":
        return 1.0

    # The bounds are for a warm-up that takes all steps, and for a step past the last one.
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    if section.name == "linear":
        decay = 1.0 - progress
    else:
        decay = 0.5 * (1.0 + math.cos(math.pi * progress))
    return section.min_ratio + (1.0 - section.min_ratio) * decay


def uses_depth_scale(tuning: TuningSection) -> bool:
    """Whether weights of different depths (`optimizers.layer_depths`) have different rates."""
    return tuning.layer_decay != 1 or tuning.unfreeze_steps > 0


def depth_scale(tuning: TuningSection, step: int) -> Callable[[int], float] | None:
    """Return the factor of the learning rate at `step` as a function of depth; None for no factor.

    The rate of a layer that is not trained yet is 0: the optimizer's moments follow the gradients,
    but the weights stay unchanged.
    """
    if not uses_depth_scale(tuning):
        return None

    def scale(depth: int) -> float:
        if step < depth * tuning.unfreeze_steps:
            return 0.0
        return tuning.layer_decay**depth

    return scale
