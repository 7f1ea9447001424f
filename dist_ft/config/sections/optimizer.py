"""The section `optimizer`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from dist_ft.config.sections.adapters import Patterns
from dist_ft.config.sections.section import Section


class OptimizerSection(Section):
    """Optimizer settings."""

    # No field is part of the identity: samples and model stay the same with another learning rate.
    name: Literal["adamw", "sgd", "adafactor"] = Field(
        "adamw",
        description="Optimizer; adafactor is not element-wise: one process or ZeRO stage 0 only.",
    )
    learning_rate: float = Field(2e-5, gt=0, description="Peak learning rate.")
    weight_decay: float = Field(
        0.0, ge=0, description="Decoupled weight decay; biases and norms are exempt."
    )
    decay_exempt: Patterns = Field(
        (),
        description=(
            "Further weights without decay: patterns of their names (*embed*, lm_head.*)."
        ),
    )
    beta1: float = Field(0.9, ge=0, lt=1, description="adamw: decay rate of the first moment.")
    beta2: float = Field(0.95, ge=0, lt=1, description="adamw: decay rate of the second moment.")
    eps: float = Field(1e-8, gt=0, description="adamw: added to the denominator.")
    momentum: float = Field(0.0, ge=0, lt=1, description="sgd: momentum.")
    max_grad_norm: float = Field(
        1.0, ge=0, description="Clip the global gradient norm to this value; 0: no clipping."
    )


USED_BY = {"beta1": "adamw", "beta2": "adamw", "eps": "adamw", "momentum": "sgd"}
"""Fields that only one optimizer uses."""


def _unused_fields(optimizer: OptimizerSection) -> Iterator[str]:
    # A field without effect is refused: whoever set it expects one.
    for field, name in USED_BY.items():
        if optimizer.name != name and not optimizer.is_default(field):
            yield (
                f"optimizer.{field}={getattr(optimizer, field)}: not used by "
                f"optimizer.name={optimizer.name}. Allowed with {name}. Remove it, or set "
                f"optimizer.name={name}."
            )


CHECKS = (_unused_fields,)
