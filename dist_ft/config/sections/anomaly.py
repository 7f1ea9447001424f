"""The section `anomaly`: detection and handling of loss and gradient anomalies."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from dist_ft.config.sections.section import Section


class AnomalySection(Section):
    """Loss and gradient anomalies: a loss or gradient norm that is not finite, or jumps.

    All workers decide together, before the weights are updated. The samples of the step are
    recorded with the run, and a replay of the step decides the same.
    """

    # No field is part of the identity: anomalies that were handled are stored with their samples,
    # and are skipped again whatever these settings are now.
    action: Literal["skip", "rollback", "stop"] = Field(
        "skip",
        description=(
            "skip: skip the update and the samples of the step; rollback: also return to the "
            "latest checkpoint and skip the samples of the last rollback_steps steps; stop: end "
            "the run."
        ),
    )
    loss_factor: float = Field(
        0,
        ge=0,
        description=(
            "A loss above this factor times the median of the last `window` steps is an anomaly; "
            "0: only NaN and infinity."
        ),
    )
    grad_norm_factor: float = Field(
        0,
        ge=0,
        description=(
            "A gradient norm above this factor times the median of the last `window` steps is an "
            "anomaly; 0: only NaN and infinity."
        ),
    )
    # The median of a few steps would itself jump.
    window: int = Field(
        64, ge=4, description="Steps of the median; before that many steps there is none."
    )
    rollback_steps: int = Field(
        8, ge=1, description="rollback: number of steps to skip, up to and with the anomaly."
    )
    max_consecutive: int = Field(
        5, ge=1, description="The run ends after more than this number of anomalies in a row."
    )
