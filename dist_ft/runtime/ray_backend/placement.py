"""What follows from what a Ray cluster has and how long it has been silent. Decides only; imports no Ray."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from dist_ft.config.schema import RunConfig
from dist_ft.core.errors import DistFtError, Interrupted, WorkerError

LOST_S = 60.0
"""Without a sign of life for so long, workers are taken for lost."""


def require_resources(ray: Any, config: RunConfig) -> None:
    """Raise WorkerError if the cluster as it stands can never hold the fewest workers."""
    if config.cluster.wait_for_nodes:
        return
    has = ray.cluster_resources()
    for resource, each in resources(config).items():
        need = each * config.min_workers
        if has.get(resource, 0) < need - 1e-9:
            raise WorkerError(
                f"cluster.workers={config.min_workers}: they need {need:g} {resource}, the cluster has "
                f"{has.get(resource, 0):g}; lower cluster.workers or cluster.cpus_per_worker, add nodes, or set "
                "cluster.wait_for_nodes=true if an autoscaler will"
            )
    _require_nodes(ray, config)


def resources(config: RunConfig) -> dict[str, float]:
    """Return what one worker reserves."""
    cluster = config.cluster
    gpus = {"GPU": float(cluster.gpus_per_worker)} if cluster.gpus_per_worker else {}
    return {"CPU": cluster.cpus_per_worker, **gpus, **cluster.resources_per_worker}


def given_up(
    config: RunConfig, waited_s: float, silent_s: float | None, stopping: bool
) -> DistFtError | None:
    """Return why to wait for workers no longer, if there is a reason. Pure.

    Args:
        config: the run.
        waited_s: seconds since workers were asked for.
        silent_s: seconds since rank 0 was last heard of; None: never.
        stopping: whether the user wants to stop.
    """
    if stopping and (silent_s is None or silent_s > LOST_S):
        return Interrupted(
            "stopped as asked; no worker was there to save anything; what was committed is kept; the "
            "same command goes on from there"
        )
    cluster = config.cluster
    if cluster.wait_for_nodes:
        return None
    field = f"cluster.start_timeout_s={cluster.start_timeout_s:g}"
    remedy = "free resources, raise it, or set cluster.wait_for_nodes=true to wait without limit"
    if silent_s is None and waited_s > cluster.start_timeout_s:
        each = ", ".join(f"{count:g} {resource}" for resource, count in resources(config).items())
        return WorkerError(
            f"{field}: no worker has started in that time; {config.min_workers} are needed, of {each} "
            f"each, and the cluster is busy, or its images are slow; {remedy}"
        )
    if (
        silent_s is not None and silent_s > 2 * cluster.start_timeout_s + LOST_S
    ):  # Ray may first ask for all in vain
        return WorkerError(
            f"{field}: the workers were lost, and none has started for {silent_s:.0f} s; what was "
            f"committed is kept, and the same command goes on from there; {remedy}"
        )
    return None


def device(gpu_ids: Sequence[Any], local_rank: int) -> int:
    """Return the index of this worker's GPU among those its node's workers share; without one, its local rank."""
    visible = [text for text in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if text]
    return visible.index(str(gpu_ids[0])) if gpu_ids and str(gpu_ids[0]) in visible else local_rank


def explain(failure: BaseException | None, config: RunConfig) -> DistFtError:
    """Return one line for what Ray Train raised: the relay knows nothing, so it is about placing or Ray itself."""
    said = "ended without a result" if failure is None else f"failed ({line_of(failure, -1)})"
    return WorkerError(
        f"run {config.run.name}: the workers {said}; see the Ray logs in /tmp/ray; what was committed "
        "is kept; the same command goes on from there"
    )


def line_of(error: BaseException, index: int) -> str:
    """Return a line of an error's text (the last, of a remote traceback, is the error); without text, its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[index]


def rooms(free: Mapping[str, float], each: Mapping[str, float]) -> int:
    """Return how many workers that need `each` fit into `free`."""
    return min(
        (int(free.get(name, 0) / need + 1e-9) for name, need in each.items() if need), default=0
    )


def by_node(nodes: Mapping[str, int], num_workers: int, per_node: int) -> list[str] | None:
    """Return the node of each worker, `per_node` to a node, the rest to a further one; None: there are too few.

    `nodes`: how many workers each has room for. Of nodes with room those with the least are taken.
    """
    found: list[str] = []
    left = sorted((room, name) for name, room in nodes.items())
    while len(found) < num_workers:
        count = min(per_node, num_workers - len(found))
        taken = next(((room, name) for room, name in left if room >= count), None)
        if taken is None:
            return None
        left.remove(taken)
        found += [taken[1]] * count
    return found


def has_labels(labels: Mapping[str, str], wanted: Mapping[str, str]) -> bool:
    """Tell whether a node's labels are as Ray's selectors want them: a value, !value, in(a, b) or !in(a, b)."""

    def fits(value: str | None, selector: str) -> bool:
        denied, plain = selector.startswith("!"), selector.removeprefix("!").strip()
        several = plain.startswith("in(") and plain.endswith(")")
        allowed = [part.strip() for part in plain[3:-1].split(",")] if several else [plain]
        return (value in allowed) != denied

    return all(fits(labels.get(name), selector) for name, selector in wanted.items())


def _require_nodes(ray: Any, config: RunConfig) -> None:
    """Raise WorkerError if the nodes the config asks for are not in the cluster."""
    cluster, each = config.cluster, resources(config)
    if not cluster.labels and not cluster.workers_per_node:
        return
    alive = [node for node in ray.nodes() if node["Alive"]]
    fitting = [node for node in alive if has_labels(node.get("Labels") or {}, cluster.labels)]
    had = [rooms(node["Resources"], each) for node in fitting]
    if cluster.workers_per_node:
        per_node = cluster.workers_per_node
        if (
            by_node(
                dict(zip(map(str, range(len(had))), had, strict=True)), config.min_workers, per_node
            )
            is None
        ):
            raise WorkerError(
                f"cluster.workers_per_node={per_node}: {config.min_workers} workers need "
                f"{-(-config.min_workers // per_node)} nodes with room for so many, the cluster has "
                f"{sum(room >= per_node for room in had)}{_labelled(config)}; lower it, add nodes, or set "
                "cluster.wait_for_nodes=true if an autoscaler will"
            )
    elif sum(had) < config.min_workers:
        raise WorkerError(
            f"cluster.labels={dict(cluster.labels)}: {len(fitting)} of {len(alive)} nodes have them, "
            f"with room for {sum(had)} workers, and {config.min_workers} are needed; correct the labels, "
            "add nodes, or set cluster.wait_for_nodes=true if an autoscaler will"
        )


def _labelled(config: RunConfig) -> str:
    return f" with the labels {dict(config.cluster.labels)}" if config.cluster.labels else ""
