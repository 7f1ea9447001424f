"""The section `log`: progress lines, metrics and experiment trackers."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from dist_ft.config.sections.section import Section


class WandbSection(Section):
    """Weights & Biases, if a project is set.

    Its key comes from WANDB_API_KEY or the machine's netrc.
    """

    project: str = Field(
        "",
        description=(
            "Project that receives the metrics; empty: not used. Needs the extra dist-ft[wandb]."
        ),
    )
    entity: str | None = Field(
        None, description="Team or user; default: the default entity of the account."
    )
    mode: Literal["online", "offline"] = Field(
        "online",
        description="offline: store in `folder` on rank 0's node, for `wandb sync` later.",
    )
    folder: str | None = Field(
        None, description="Local folder of its files; default: wandb in data.cache_dir."
    )


class MlflowSection(Section):
    """MLflow, if an experiment is set.

    Its credentials come from the environment (MLFLOW_TRACKING_TOKEN ...).
    """

    experiment: str = Field(
        "",
        description=(
            "Experiment that receives the metrics; empty: not used. Needs the extra "
            "dist-ft[mlflow]."
        ),
    )
    tracking_uri: str | None = Field(
        None,
        description=("Server, database (sqlite:///file) or folder; default: MLFLOW_TRACKING_URI."),
    )


class LogSection(Section):
    """Progress lines, metrics and experiment trackers."""

    # No field is part of the identity: what is logged changes nothing of the run.
    every_steps: int = Field(1, ge=1, description="Steps between progress lines and metrics.")
    straggler_steps: int = Field(
        20,
        ge=0,
        description=(
            "Steps between comparisons of the workers' speed; a slow worker is named; 0: never."
        ),
    )
    tensorboard: bool = Field(True, description="Write TensorBoard events into the run's storage.")
    wandb: WandbSection = Field(default_factory=WandbSection, description="Weights & Biases.")
    mlflow: MlflowSection = Field(default_factory=MlflowSection, description="MLflow.")
    level: Literal["debug", "info", "warning"] = Field(
        "info", description="Lowest level of log lines to show."
    )
