"""The result of a run. Light: no torch, so that a driver starts fast."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Result:
    """The state of a run when a process has finished its part.

    Attributes:
        run_url: the run's folder.
        step, total_steps: steps done, and all steps.
        loss: training loss of the last step; None if this process trained no step.
        evaluation_before, evaluation_after: held-out loss before step 1 and after the last step;
            None where the config does not evaluate then.
        checkpoint: URL of the latest checkpoint; None without one.
        data_wait_share: share of the steps' time that rank 0 waited for data, 0..1; None without a
            step.
    """

    run_url: str
    step: int
    total_steps: int
    loss: float | None = None
    evaluation_before: float | None = None
    evaluation_after: float | None = None
    checkpoint: str | None = None
    data_wait_share: float | None = field(default=None, compare=False)
