"""The section `cluster`: where workers run, how they are placed, and what joins them. Types and bounds only."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from dist_ft.config.sections.section import Section


class WorkerRange(Section):
    """Fewest and most workers of an elastic run."""

    min: int = Field(ge=1, description="Below this the run waits.")
    max: int = Field(ge=1, description="More are not used.")


def _as_workers(value: Any) -> Any:
    """Accept `2`, `[1, 4]` and `1..4`."""
    if isinstance(value, str) and ".." in value:
        value = value.split("..", 1)
    if isinstance(value, list | tuple) and len(value) == 2:
        return {"min": value[0], "max": value[1]}
    return value


class ClusterSection(Section):
    """Where workers run."""

    workers: Annotated[int | WorkerRange, BeforeValidator(_as_workers)] = Field(
        0,
        description=(
            "Ray workers: a number, or a range [min, max] (also min..max) of an elastic run. "
            "0: this process, plain PyTorch, no Ray and no DeepSpeed."
        ),
    )
    address: str | None = Field(
        None,
        description=(
            "Ray cluster to join (auto: the one around this process); none: RAY_ADDRESS if set, else an own local Ray."
        ),
    )
    cpus_per_worker: float = Field(1, gt=0, description="CPU cores reserved a worker.")
    gpus_per_worker: int = Field(
        0, ge=0, le=1, description="GPUs a worker: 0 (CPU, gloo) or 1 (nccl)."
    )
    resources_per_worker: dict[str, float] = Field(
        default_factory=dict, description="Further Ray resources a worker."
    )
    placement: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = Field(
        "PACK", description="Ray placement strategy."
    )
    labels: dict[str, str] = Field(
        default_factory=dict,
        description=(
            "Ray node labels that every worker's node must have, as Ray's selectors: {ray.io/accelerator-type: H100}, "
            "{region: in(a, b)}, {disk: '!hdd'}."
        ),
    )
    workers_per_node: int = Field(
        0,
        ge=0,
        description=(
            "Workers on each node (its GPUs, for whole nodes); fewer only on the last, where the number of workers is no "
            "multiple. 0: as placement says."
        ),
    )
    network_interface: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9_.:@-]+(,[A-Za-z0-9_.:@-]+)*$",
        description=(
            "Network interface (or several: eth0,eth1) of the workers' own traffic, for nccl and gloo; none: they choose."
        ),
    )
    network_variables: dict[str, str] = Field(
        default_factory=dict,
        description=(
            "Further variables of nccl, gloo, UCX and libfabric, set in workers before they meet: {NCCL_IB_HCA: mlx5}."
        ),
    )
    network_check: Literal["auto", "on", "off"] = Field(
        "auto",
        description=(
            "Before step 1: is a sum over all workers right, how fast is it, and each pair of nodes? A slow pair is named. "
            "auto: when there is more than one node; on: also on one."
        ),
    )
    network_min_mb_s: float = Field(
        0,
        ge=0,
        description=(
            "network_check: a pair of nodes with less than this many MB/s is named too; 0: only by comparison."
        ),
    )
    max_failures: int = Field(
        3,
        ge=-1,
        description=(
            "Restarts without a new checkpoint in between (each one refills them); -1: without limit."
        ),
    )
    standby: bool = Field(
        True,
        description=(
            "Keep a spare process a worker, everything imported, that takes over at once when one fails (about 0.5 GB of "
            "host memory each)."
        ),
    )
    wait_for_nodes: bool = Field(
        False,
        description=(
            "Wait without limit for nodes (an autoscaler's, or busy ones); off: too small a cluster is an error at once, a "
            "busy one after start_timeout_s."
        ),
    )
    start_timeout_s: float = Field(
        300,
        gt=0,
        description=(
            "Seconds to wait for workers to start (busy cluster, slow images); once lost, for others twice that."
        ),
    )
    resize_interval_s: float = Field(
        600,
        gt=0,
        description=(
            "Elastic run: seconds between looks for more nodes. To take them the run saves, and its workers start anew."
        ),
    )
    collective_timeout_s: float = Field(
        1800, gt=0, description="Seconds after which a stuck collective is an error."
    )
    progress_timeout_s: float = Field(
        1800,
        ge=0,
        description=(
            "Seconds without a step, an evaluated batch or a save, after which a worker keeps its stacks and ends; "
            "0: never."
        ),
    )
