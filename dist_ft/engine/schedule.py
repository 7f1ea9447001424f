"""The learning rate as a pure function of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math
from collections.abc import Callable

from dist_ft.config.schema import ScheduleSection, TuningSection


def warmup_steps(section: ScheduleSection, total_steps: int) -> int:
    """Return the number of warm-up steps of a run of `total_steps`."""
    if section.warmup_steps is not None:
        return section.warmup_steps
    return math.ceil(
        round((section.warmup_ratio or 0.0) * total_steps, 6)
    )  # 0.07 * 100 is a little above 7


def learning_rate_factor(section: ScheduleSection, step: int, total_steps: int) -> float:
    """Return learning rate / peak for `step` (0 is the first): warm-up to 1, then down to `min_ratio` at the end."""
    warmup = warmup_steps(section, total_steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if section.name == "constant":
        return 1.0
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    shape = (
        1.0 - progress if section.name == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    )
    return section.min_ratio + (1.0 - section.min_ratio) * shape


def uses_depth_scale(tuning: TuningSection) -> bool:
    """Tell whether weights of different depths (`optimizers.depths`) learn at different rates."""
    return tuning.layer_decay != 1 or tuning.unfreeze_steps > 0


def depth_scale(tuning: TuningSection, step: int) -> Callable[[int], float] | None:
    """Return what the learning rate is multiplied with at a depth at `step`; None: nothing.

    A layer that does not learn yet has rate 0: its moments follow its gradients meanwhile, its weights stay.
    """
    if not uses_depth_scale(tuning):
        return None
    return lambda depth: tuning.layer_decay**depth if step >= depth * tuning.unfreeze_steps else 0.0
