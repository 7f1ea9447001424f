"""The sections `run` and `storage`: identity and location of a run, and access to storage."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from dist_ft.config.sections.section import Identity, Section


class RunSection(Section):
    """Name, location and seed of the run."""

    # KubeRay allows 47 characters for the name of a RayJob. Not marked as identity: another name is
    # another run, so there is nothing to compare.
    name: str = Field(
        pattern=r"^[a-z0-9]([a-z0-9-]{0,45}[a-z0-9])?$",
        description=(
            "Name of the run: lower-case letters, digits and '-', at most 47 characters (a "
            "Kubernetes limit). The same name under the same storage is the same run, and is "
            "resumed."
        ),
    )
    storage: str = Field(
        "./runs",
        description=(
            "fsspec URL or folder of runs; this run stores config, index, checkpoints, ledger and "
            "metrics in its subfolder <name>/."
        ),
    )
    # Below 2**63, as the seeds that `core.seeds` derives from it.
    seed: int = Identity(
        0,
        ge=0,
        lt=2**63,
        description="Seed of the sample order, of dropout and of newly initialized weights.",
    )
    # Operational: a run that was stopped by a limit resumes with a higher one.
    max_hours: float | None = Field(
        None,
        gt=0,
        description=(
            "Hours of all attempts of the run together, restarts between them included, after "
            "which it saves and stops with exit code 3; default: no limit."
        ),
    )
    max_cost: float | None = Field(
        None,
        gt=0,
        description=(
            "Cost of all attempts together, in the unit of cluster.cost_per_hour, at which the run "
            "saves and stops with exit code 3; default: no limit."
        ),
    )


class StorageSection(Section):
    """fsspec options of storage. Credentials come from the environment, never from the config."""

    options: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description=(
            "fsspec options by protocol, such as {s3: {endpoint_url: http://127.0.0.1:5000}}."
        ),
    )
