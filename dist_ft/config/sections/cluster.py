"""The section `cluster`: Ray workers, their placement and their network."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from dist_ft.config.sections.section import Section

NETWORK_VARIABLE_PREFIXES = ("NCCL_", "TORCH_NCCL_", "GLOO_", "UCX_", "FI_", "RDMAV_")
"""Prefixes of cluster.network_variables: such variables change no result and hold no secret."""
INTERFACE_VARIABLES = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")
"""Variables that cluster.network_interface sets."""
NODE_ID_LABEL = "ray.io/node-id"
"""Label with Ray's name of a node."""
WATCHDOG_MARGIN_S = 60.0
"""How much longer than cluster.progress_timeout_s a collective may take. In that time a worker
without progress stores its stack traces (25 s at most) and ends."""
HEARTBEAT_VARIABLE = "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"
"""Variable with the seconds after which torch ends a process whose NCCL watchdog is stuck."""


class WorkerRange(Section):
    """Number of workers of an elastic run."""

    # Whether min is at most max is a check of the section, whose line can name both.
    min: int = Field(ge=1, description="With fewer workers the run waits.")
    max: int = Field(ge=1, description="Further workers are not used.")


def _as_workers(value: Any) -> Any:
    """Accept `2`, `[1, 4]` and `1..4`."""
    # A form for the command line, where brackets would have to be quoted. pydantic makes numbers of
    # its two texts.
    if isinstance(value, str) and ".." in value:
        value = value.split("..", 1)

    if isinstance(value, list | tuple) and len(value) == 2:
        return {"min": value[0], "max": value[1]}
    return value


class ClusterSection(Section):
    """Ray workers, their placement and their network."""

    # No field is part of the identity: a run may resume on other nodes and more or fewer workers.
    workers: Annotated[int | WorkerRange, BeforeValidator(_as_workers)] = Field(
        0,
        description=(
            "Ray workers: a number, or a range [min, max] (also min..max) for an elastic run; 0: "
            "this process, with plain PyTorch, without Ray and DeepSpeed."
        ),
    )
    address: str | None = Field(
        None,
        description=(
            "Ray cluster to join (auto: the one of this machine); default: RAY_ADDRESS if set, "
            "else a new local Ray."
        ),
    )
    cpus_per_worker: float = Field(1, gt=0, description="CPU cores reserved per worker.")
    # One process per GPU, as torch.distributed and DeepSpeed expect.
    gpus_per_worker: int = Field(
        0, ge=0, le=1, description="GPUs per worker: 0 (CPU, gloo) or 1 (nccl)."
    )
    resources_per_worker: dict[str, float] = Field(
        default_factory=dict, description="Further Ray resources per worker."
    )
    placement: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = Field(
        "PACK", description="Ray placement strategy."
    )
    labels: dict[str, str] = Field(
        default_factory=dict,
        description=(
            "Ray node labels that the node of every worker must have, as Ray selectors: "
            "{ray.io/accelerator-type: H100}, {region: in(a, b)}, {disk: '!hdd'}."
        ),
    )
    workers_per_node: int = Field(
        0,
        ge=0,
        description=(
            "Workers on each node (its number of GPUs, for whole nodes); the last node has fewer "
            "if the number of workers is not a multiple; 0: by placement."
        ),
    )
    # Goes into environment variables of nccl and gloo, which take a comma-separated list.
    network_interface: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9_.:@-]+(,[A-Za-z0-9_.:@-]+)*$",
        description=(
            "Network interface (or several: eth0,eth1) of the traffic between workers, for nccl "
            "and gloo; default: they choose."
        ),
    )
    network_variables: dict[str, str] = Field(
        default_factory=dict,
        description=(
            "Further variables of nccl, gloo, UCX and libfabric, set in workers before they "
            "connect: {NCCL_IB_HCA: mlx5}."
        ),
    )
    network_check: Literal["auto", "on", "off"] = Field(
        "auto",
        description=(
            "Before step 1, check that a sum over all workers is correct, and measure the "
            "bandwidth of all workers and of each pair of nodes; slow pairs are named. auto: with "
            "more than one node; on: also on one."
        ),
    )
    network_min_mb_s: float = Field(
        0,
        ge=0,
        description=(
            "network_check: also name pairs of nodes with less than this many MB/s; 0: only by "
            "comparison."
        ),
    )
    cost_per_hour: float = Field(
        0,
        ge=0,
        description=(
            "Cost of one worker (in one process: of this process) for an hour, in any unit, for "
            "run.max_cost."
        ),
    )
    max_failures: int = Field(
        3,
        ge=-1,
        description=(
            "Restarts without a new checkpoint in between (a new checkpoint resets the count); -1: "
            "no limit."
        ),
    )
    avoid_nodes: tuple[str, ...] = Field(
        (),
        description=(
            "Nodes that get no workers: host names, addresses, Ray's ids of nodes, or names as "
            "messages show them (host/01234567)."
        ),
    )
    exclude_node_after: int = Field(
        0,
        ge=0,
        description=(
            "Failures of one node within a day (crash, hang, out of memory, lost) after which it "
            "gets no more workers, if the other nodes hold the smallest number of workers; 0: "
            "never."
        ),
    )
    standby: bool = Field(
        True,
        description=(
            "Hold a spare process per worker, with all imports done, that takes over at once after "
            "a failure (about 0.5 GB of host memory each)."
        ),
    )
    wait_for_nodes: bool = Field(
        False,
        description=(
            "Wait without limit for nodes (of an autoscaler, or busy ones); off: a cluster that is "
            "too small is an error at once, a busy one after start_timeout_s."
        ),
    )
    start_timeout_s: float = Field(
        300,
        gt=0,
        description=(
            "Seconds to wait for workers to start (busy cluster, slow images); twice that for "
            "replacements of lost workers."
        ),
    )
    resize_interval_s: float = Field(
        600,
        gt=0,
        description=(
            "Elastic run: seconds between checks for more nodes. To use them the run saves, and "
            "its workers restart."
        ),
    )
    collective_timeout_s: float = Field(
        1800,
        gt=0,
        description=(
            "Seconds after which a stuck collective is an error; at least progress_timeout_s + 60 "
            "are used, because nccl then ends all workers, and the one that hangs must be named "
            "before."
        ),
    )
    progress_timeout_s: float = Field(
        1800,
        ge=0,
        description=(
            "Seconds without a step, an evaluated batch or a save, after which a worker stores its "
            "stack traces and ends; 0: never."
        ),
    )

    @property
    def group_timeout_s(self) -> float:
        """Timeout of the collectives of all process groups, in seconds."""
        # Without a watchdog nothing is named, and the configured value counts alone.
        if not self.progress_timeout_s:
            return self.collective_timeout_s
        return max(self.collective_timeout_s, self.progress_timeout_s + WATCHDOG_MARGIN_S)


def format_workers(cluster: ClusterSection) -> str:
    """Return cluster.workers as messages show it: 4, or [1, 4]."""
    workers = cluster.workers
    if isinstance(workers, int):
        return str(workers)
    return f"[{workers.min}, {workers.max}]"


def _worker_range(cluster: ClusterSection) -> Iterator[str]:
    workers = cluster.workers
    if isinstance(workers, int):
        if workers < 0:
            yield (
                f"cluster.workers={workers}: the number of workers is negative. 0 is this process "
                "without Ray, 1 or more are Ray workers. Correct it."
            )
    elif workers.min > workers.max:
        yield (
            f"cluster.workers={format_workers(cluster)}: the minimum is above the maximum. A range "
            f"is [min, max]. Write [{workers.max}, {workers.min}]."
        )


def _workers_per_node(cluster: ClusterSection) -> Iterator[str]:
    field = f"cluster.workers_per_node={cluster.workers_per_node}"
    if not cluster.workers_per_node:
        return

    if cluster.workers == 0:
        yield (
            f"{field}: cluster.workers=0 is a single process. Allowed with Ray workers. Set "
            "cluster.workers, or remove it."
        )

    if cluster.placement != "PACK":
        yield (
            f"{field}: cluster.placement={cluster.placement} also decides how workers are spread. "
            "Only one of them is allowed. Set cluster.placement=PACK, or workers_per_node=0."
        )

    # Whole nodes are chosen by this label, one selector per worker.
    if NODE_ID_LABEL in cluster.labels:
        yield (
            f"cluster.labels.{NODE_ID_LABEL}: dist_ft chooses the nodes if "
            "cluster.workers_per_node is set. Allowed: other labels. Remove it."
        )


def _avoid_nodes(cluster: ClusterSection) -> Iterator[str]:
    if not cluster.avoid_nodes:
        return

    field = f"cluster.avoid_nodes=[{', '.join(cluster.avoid_nodes)}]"
    if cluster.workers == 0:
        yield (
            f"{field}: cluster.workers=0 is a single process. Allowed with Ray workers. Set "
            "cluster.workers, or remove it."
        )
    if not all(name.strip() for name in cluster.avoid_nodes):
        yield (
            f"{field}: a name is empty. Allowed: host names, addresses, ids of nodes and names "
            "such as host/01234567. Remove it."
        )
    if NODE_ID_LABEL in cluster.labels:
        yield (
            f"{field}: cluster.labels.{NODE_ID_LABEL} also chooses nodes. Only one of them is "
            "allowed. Remove the other."
        )


def _network_variables(cluster: ClusterSection) -> Iterator[str]:
    # Stored with the run and shown to people, so only prefixes that are known to hold no secret.
    for name in cluster.network_variables:
        field = f"cluster.network_variables.{name}"
        if name in INTERFACE_VARIABLES and cluster.network_interface is not None:
            yield (
                f"{field}: cluster.network_interface={cluster.network_interface} also sets it. "
                "Only one of them is allowed. Remove the other."
            )
        elif not name.startswith(NETWORK_VARIABLE_PREFIXES):
            yield (
                f"{field}: not a variable of nccl, gloo, UCX or libfabric. Allowed: names that "
                f"start with {', '.join(NETWORK_VARIABLE_PREFIXES)}. Set others in the environment "
                "of the cluster."
            )


def _timeouts(cluster: ClusterSection) -> Iterator[str]:
    progress_s = cluster.progress_timeout_s
    if not progress_s:
        return

    # The default is raised without a line: only progress_timeout_s was chosen then.
    timeout_s = cluster.collective_timeout_s
    if timeout_s < progress_s and not cluster.is_default("collective_timeout_s"):
        yield (
            f"cluster.collective_timeout_s={timeout_s:g}: shorter than "
            f"cluster.progress_timeout_s={progress_s:g}, so nccl would end all workers before the "
            "one that hangs is named. At least progress_timeout_s is allowed. Raise it, or lower "
            f"cluster.progress_timeout_s to {timeout_s:g}."
        )

    text = cluster.network_variables.get(HEARTBEAT_VARIABLE)
    if text is None:
        return
    field = f"cluster.network_variables.{HEARTBEAT_VARIABLE}={text}"
    if not (text.isascii() and text.isdigit()):
        yield f"{field}: not a whole number of seconds. Allowed: digits. Correct it, or remove it."
    elif int(text) < progress_s:
        yield (
            f"{field}: shorter than cluster.progress_timeout_s={progress_s:g}, so torch would end "
            "a worker before it is named. At least progress_timeout_s is allowed. Raise it, or "
            "remove it: dist_ft sets it."
        )


CHECKS = (_worker_range, _workers_per_node, _avoid_nodes, _network_variables, _timeouts)
