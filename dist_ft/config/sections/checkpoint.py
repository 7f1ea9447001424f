"""The section `checkpoint`: when checkpoints are saved, where, and which are retained."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from dist_ft.config.sections.section import Section

Steps = Annotated[int, Field(ge=0)] | Literal["auto"]


class CheckpointSection(Section):
    """When checkpoints are saved, where, and which are retained."""

    # No field is part of the identity: a save does not change what is trained.
    every_steps: Steps = Field(
        0,
        description=(
            "Steps between checkpoints in storage; auto: the best interval for the measured cost "
            "of saves and rate of failures (Young, Daly); 0: only at the end."
        ),
    )
    local_folder: str = Field(
        "",
        description=(
            "Folder on each worker's own node for checkpoints between those in storage: a local "
            "disk, or memory (/dev/shm/...). They survive processes, not nodes, and serve a "
            "restart with the same workers; empty: none."
        ),
    )
    local_every_steps: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto", description="Steps between checkpoints in local_folder; auto: as for every_steps."
    )
    # Only a prior: without a failure so far there is no rate to compute the interval from.
    failure_interval_s: float = Field(
        10800,
        gt=0,
        description=(
            "auto: expected seconds between failures before any failure was observed (10,800: 3 "
            "hours); observations outweigh it."
        ),
    )
    at_end: bool = Field(True, description="Also save the last step.")
    background: bool = Field(
        True,
        description=(
            "Write from a copy of the state in host memory while training continues; off: training "
            "waits."
        ),
    )
    background_mb_s: float = Field(
        0, ge=0, description="Limit of a worker's background writes in MB/s; 0: no limit."
    )
    when_busy: Literal["wait", "skip"] = Field(
        "wait",
        description=(
            "A save is due while the previous one is still being written: wait for it, or skip the "
            "new one."
        ),
    )
    keep_last: int = Field(2, ge=1, description="Number of latest checkpoints to retain.")
    keep_every_steps: int = Field(
        0, ge=0, description="Also retain checkpoints whose step is a multiple of this; 0: none."
    )
    keep_best: int = Field(
        0,
        ge=0,
        description=(
            "Also retain this number of checkpoints that are best by best_by "
            "(evaluation.every_steps); 0: none."
        ),
    )
    # Which metrics there are depends on the task, so a check compares it with them (`checks`).
    best_by: str = Field(
        "loss",
        min_length=1,
        description=(
            "Metric of evaluations that ranks checkpoints: loss, one of the task's (accuracy, f1, "
            "...) or of evaluation.text_metrics; losses, errors and perplexity are better when "
            "lower, others when higher."
        ),
    )


def _keep_every_steps(checkpoint: CheckpointSection) -> Iterator[str]:
    every = checkpoint.every_steps
    keep = checkpoint.keep_every_steps
    if not keep:
        return

    if every in (0, "auto"):
        # "auto" adapts the interval, so no step is certain to be saved.
        reason = f"checkpoint.every_steps is {every}"
    elif keep % int(every):
        reason = f"not a multiple of checkpoint.every_steps={every}"
    else:
        return

    yield (
        f"checkpoint.keep_every_steps={keep}: {reason}, so such steps are never saved. Allowed: a "
        "multiple of checkpoint.every_steps, or 0. Change one of them."
    )


def _local_folder(checkpoint: CheckpointSection) -> Iterator[str]:
    if "://" in checkpoint.local_folder:
        yield (
            f"checkpoint.local_folder={checkpoint.local_folder}: not a folder of a node. Allowed: "
            "a local disk or memory, such as /dev/shm/dist_ft. Use run.storage for checkpoints in "
            "a bucket."
        )


CHECKS = (_keep_every_steps, _local_folder)
