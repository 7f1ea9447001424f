"""Decides whether a run can start, how long it waits for workers, and which node each one gets.

Imports no Ray.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from dist_ft.config.schema import RunConfig
from dist_ft.core.errors import DistFtError, Interrupted, WorkerError
from dist_ft.runtime.ray_backend.node_names import matching_nodes

LOST_S = 60.0
"""Workers without a sign of life for this long count as lost."""
_ROUNDING = 1e-9
"""Tolerance in comparisons of resources, which are sums of fractions such as 0.1 CPUs."""


def require_resources(ray: Any, config: RunConfig) -> None:
    """Check that the cluster as it is can hold the smallest number of workers.

    Raises:
        WorkerError: it never can.
    """
    # An autoscaler adds nodes only for workers that wait, so what exists now says nothing.
    if config.cluster.wait_for_nodes:
        return

    # What the nodes have, not what is free: other runs end, but a cluster that is too small stays.
    available = ray.cluster_resources()
    for resource, per_worker in worker_resources(config).items():
        needed = per_worker * config.min_workers
        if available.get(resource, 0) < needed - _ROUNDING:
            raise WorkerError(
                f"cluster.workers={config.min_workers}: the workers need {needed:g} {resource}, "
                f"the cluster has {available.get(resource, 0):g}; lower cluster.workers or "
                "cluster.cpus_per_worker, add nodes, or set cluster.wait_for_nodes=true if an "
                "autoscaler adds them"
            )

    _require_nodes(ray, config)


def worker_resources(config: RunConfig) -> dict[str, float]:
    """Return what one worker reserves, by Ray's name of the resource."""
    cluster = config.cluster
    resources = {"CPU": cluster.cpus_per_worker}
    if cluster.gpus_per_worker:
        resources["GPU"] = float(cluster.gpus_per_worker)

    return {**resources, **cluster.resources_per_worker}


def reason_to_stop_waiting(
    config: RunConfig, waited_s: float, silent_s: float | None, is_stopping: bool
) -> DistFtError | None:
    """Return the error that ends the wait for workers, or None to continue.

    Args:
        config: the run.
        waited_s: seconds since workers were requested.
        silent_s: seconds since the last sign of life of rank 0; None: there was none.
        is_stopping: whether the user requested a stop.
    """
    # With workers alive the stop goes to them, and they save first.
    if is_stopping and (silent_s is None or silent_s > LOST_S):
        return Interrupted(
            "stopped as requested, without a new checkpoint because no worker was running; saved "
            "checkpoints are kept; run the same command to resume"
        )

    cluster = config.cluster
    if cluster.wait_for_nodes:
        return None

    field = f"cluster.start_timeout_s={cluster.start_timeout_s:g}"
    remedy = "free resources, raise it, or set cluster.wait_for_nodes=true to wait without limit"

    if silent_s is None and waited_s > cluster.start_timeout_s:
        resources = worker_resources(config)
        each = ", ".join(f"{count:g} {resource}" for resource, count in resources.items())
        return WorkerError(
            f"{field}: no worker started within that time; {config.min_workers} workers are "
            f"needed, with {each} each, and the cluster is busy or pulls images slowly; {remedy}"
        )

    # Ray may first try in vain with the full number of workers.
    if silent_s is not None and silent_s > 2 * cluster.start_timeout_s + LOST_S:
        return WorkerError(
            f"{field}: the workers were lost, and none has started for {silent_s:.0f} s; saved "
            f"checkpoints are kept; {remedy}; run the same command to resume"
        )
    return None


def gpu_index(gpu_ids: Sequence[Any], local_rank: int) -> int:
    """Return the index of this worker's GPU among those that the node's workers share.

    Without a known GPU this is the worker's rank on its node.
    """
    # Ray gives each worker its own GPUs, but lets all workers of a node see those of all
    # (`share_cuda_visible_devices`), so the index is one into the shared list.
    visible = [text for text in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if text]
    if gpu_ids and str(gpu_ids[0]) in visible:
        return visible.index(str(gpu_ids[0]))
    return local_rank


def explain_ray_failure(
    failure: BaseException | None, config: RunConfig, logs_folder: str
) -> DistFtError:
    """Return one line for an exception of Ray Train; `logs_folder`: where Ray writes its logs.

    The coordinator has no outcome then, so the failure is one of placement or of Ray itself.
    """
    event = "ended without a result"
    if failure is not None:
        event = f"failed ({error_line(failure, -1)})"
    return WorkerError(
        f"run {config.run.name}: the workers {event}; see the Ray logs in "
        f"{logs_folder}; saved checkpoints are kept; run the same command to resume"
    )


def error_line(error: BaseException, index: int) -> str:
    """Return a line of an error's text, or its type if it has no text.

    The last line (`index` -1) of a remote traceback is the error itself.
    """
    # An error without text still gives a line.
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[index]


def num_workers_that_fit(free: Mapping[str, float], per_worker: Mapping[str, float]) -> int:
    """Return how many workers that reserve `per_worker` fit into `free`."""
    # The scarcest resource decides; one that is not needed would divide by 0.
    counts = []
    for name, needed in per_worker.items():
        if needed:
            counts.append(int(free.get(name, 0) / needed + _ROUNDING))

    return min(counts, default=0)


def assign_nodes(
    capacities: Mapping[str, int], num_workers: int, workers_per_node: int
) -> list[str] | None:
    """Assign `workers_per_node` workers to each node and the rest to one more, if possible.

    Returns the node of each worker; None: there are too few nodes. `capacities`: how many workers
    fit on each node. The nodes with the least sufficient capacity are used.
    """
    # Best fit, so that large nodes stay free for other runs. By capacity, then by name: a restart
    # on the same nodes gets the same ones.
    assigned: list[str] = []
    unused = sorted((capacity, name) for name, capacity in capacities.items())
    while len(assigned) < num_workers:
        count = min(workers_per_node, num_workers - len(assigned))  # fewer on the last node
        chosen = next(((capacity, name) for capacity, name in unused if capacity >= count), None)
        if chosen is None:
            return None

        unused.remove(chosen)
        assigned += [chosen[1]] * count

    return assigned


def has_labels(labels: Mapping[str, str], selectors: Mapping[str, str]) -> bool:
    """Return whether labels match Ray's selectors: a value, !value, in(a, b) or !in(a, b)."""
    return all(_matches(labels.get(name), selector) for name, selector in selectors.items())


def _matches(value: str | None, selector: str) -> bool:
    is_negated = selector.startswith("!")
    values = selector.removeprefix("!").strip()
    if values.startswith("in(") and values.endswith(")"):
        allowed = [part.strip() for part in values[3:-1].split(",")]
    else:
        allowed = [values]

    # A node without the label has no value, which matches every negated selector.
    return (value in allowed) != is_negated


def _require_nodes(ray: Any, config: RunConfig) -> None:
    """Check that the cluster has the nodes that the config needs.

    Raises:
        WorkerError: it has not.
    """
    cluster = config.cluster
    # Else the sums over all nodes are enough, which `require_resources` compares.
    if not cluster.labels and not cluster.workers_per_node and not cluster.avoid_nodes:
        return

    # Ray also lists nodes that were lost.
    alive = [node for node in ray.nodes() if node["Alive"]]
    if cluster.avoid_nodes:
        avoided = matching_nodes(alive, frozenset(cluster.avoid_nodes))
        alive = [node for node in alive if node["NodeID"] not in avoided]

    labeled = [node for node in alive if has_labels(node.get("Labels") or {}, cluster.labels)]
    per_worker = worker_resources(config)
    capacities = [num_workers_that_fit(node["Resources"], per_worker) for node in labeled]

    if cluster.workers_per_node:
        per_node = cluster.workers_per_node
        by_index = {str(index): capacity for index, capacity in enumerate(capacities)}

        # By the rule that places the workers later, so that what passes here can be placed.
        if assign_nodes(by_index, config.min_workers, per_node) is None:
            num_nodes = -(-config.min_workers // per_node)
            num_suitable = sum(capacity >= per_node for capacity in capacities)
            labels = f" with the labels {dict(cluster.labels)}" if cluster.labels else ""
            raise WorkerError(
                f"cluster.workers_per_node={per_node}: {config.min_workers} workers need "
                f"{num_nodes} nodes with room for {per_node} each, the cluster has "
                f"{num_suitable}{labels}; lower it, add nodes, or set cluster.wait_for_nodes=true "
                "if an autoscaler adds them"
            )
    elif sum(capacities) < config.min_workers and not cluster.labels:
        raise WorkerError(
            f"cluster.avoid_nodes=[{', '.join(cluster.avoid_nodes)}]: the other {len(alive)} nodes "
            f"have room for {sum(capacities)} workers, but {config.min_workers} are needed; avoid "
            "fewer nodes, add nodes, or set cluster.wait_for_nodes=true if an autoscaler adds them"
        )
    elif sum(capacities) < config.min_workers:
        raise WorkerError(
            f"cluster.labels={dict(cluster.labels)}: {len(labeled)} of {len(alive)} nodes have "
            f"these labels, with room for {sum(capacities)} workers, but {config.min_workers} are "
            "needed; correct the labels, add nodes, or set cluster.wait_for_nodes=true if an "
            "autoscaler adds them"
        )
