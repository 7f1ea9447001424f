"""The result of a run. Light: no torch, so that a driver starts fast."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Result:
    """How a run stands when its process is done with it.

    Attributes:
        evaluation_before, evaluation_after: held-out loss before step 1 and after the last; None where not asked for.
        checkpoint: URL of the newest commit; None without one.
        data_wait_share: share of the steps' time rank 0 waited for data, 0..1; None without a step.
    """

    run_url: str
    step: int
    total_steps: int
    loss: float | None = None
    evaluation_before: float | None = None
    evaluation_after: float | None = None
    checkpoint: str | None = None
    data_wait_share: float | None = field(default=None, compare=False)
