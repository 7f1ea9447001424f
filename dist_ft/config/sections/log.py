"""The section `log`: what a person sees of a run, here and in the trackers they use. Types and bounds only."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from dist_ft.config.sections.section import Section


class WandbSection(Section):
    """Weights & Biases, if a project is named. Its key comes from WANDB_API_KEY or the machine's netrc."""

    project: str = Field(
        "", description="Project metrics go to; empty: not used. Needs the extra dist-ft[wandb]."
    )
    entity: str | None = Field(None, description="Team or user; none: the account's own.")
    mode: Literal["online", "offline"] = Field(
        "online",
        description=("offline: kept in `folder` of rank 0's node, for `wandb sync` later."),
    )
    folder: str | None = Field(
        None, description="Local folder for its files; none: wandb in data.cache_dir."
    )


class MlflowSection(Section):
    """MLflow, if an experiment is named. Its credentials come from the environment (MLFLOW_TRACKING_TOKEN ...)."""

    experiment: str = Field(
        "",
        description=("Experiment metrics go to; empty: not used. Needs the extra dist-ft[mlflow]."),
    )
    tracking_uri: str | None = Field(
        None,
        description=("Server, database (sqlite:///file) or folder; none: MLFLOW_TRACKING_URI."),
    )


class LogSection(Section):
    """What a person sees."""

    every_steps: int = Field(1, ge=1, description="Steps between progress lines and metrics.")
    straggler_steps: int = Field(
        20,
        ge=0,
        description=(
            "Steps between comparisons of the workers' pace; a slow one is named; 0: never."
        ),
    )
    tensorboard: bool = Field(True, description="Write TensorBoard events into the run's storage.")
    wandb: WandbSection = Field(default_factory=WandbSection, description="Weights & Biases.")
    mlflow: MlflowSection = Field(default_factory=MlflowSection, description="MLflow.")
    level: Literal["debug", "info", "warning"] = Field(
        "info", description="Least severe log line shown."
    )
