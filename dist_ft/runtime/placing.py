"""What follows from what a Ray cluster has and how long it has been silent. Decides only; imports no Ray."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from dist_ft.config.schema import RunConfig
from dist_ft.errors import DistFtError, Interrupted, WorkerError

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
                "cluster.wait_for_nodes=true if an autoscaler will")


def resources(config: RunConfig) -> dict[str, float]:
    """Return what one worker reserves."""
    cluster = config.cluster
    gpus = {"GPU": float(cluster.gpus_per_worker)} if cluster.gpus_per_worker else {}
    return {"CPU": cluster.cpus_per_worker, **gpus, **cluster.resources_per_worker}


def given_up(config: RunConfig, waited_s: float, silent_s: float | None, stopping: bool) -> DistFtError | None:
    """Return why to wait for workers no longer, if there is a reason. Pure.

    Args:
        config: the run.
        waited_s: seconds since workers were asked for.
        silent_s: seconds since rank 0 was last heard of; None: never.
        stopping: whether the user wants to stop.
    """
    if stopping and (silent_s is None or silent_s > LOST_S):
        return Interrupted("stopped as asked; no worker was there to save anything; what was committed is kept; the "
                           "same command goes on from there")
    cluster = config.cluster
    if cluster.wait_for_nodes:
        return None
    field = f"cluster.start_timeout_s={cluster.start_timeout_s:g}"
    remedy = "free resources, raise it, or set cluster.wait_for_nodes=true to wait without limit"
    if silent_s is None and waited_s > cluster.start_timeout_s:
        each = ", ".join(f"{count:g} {resource}" for resource, count in resources(config).items())
        return WorkerError(f"{field}: no worker has started in that time; {config.min_workers} are needed, of {each} "
                           f"each, and the cluster is busy, or its images are slow; {remedy}")
    if silent_s is not None and silent_s > 2 * cluster.start_timeout_s + LOST_S:  # Ray may first ask for all in vain
        return WorkerError(f"{field}: the workers were lost, and none has started for {silent_s:.0f} s; what was "
                           f"committed is kept, and the same command goes on from there; {remedy}")
    return None


def device(gpu_ids: Sequence[Any], local_rank: int) -> int:
    """Return the index of this worker's GPU among those its node's workers share; without one, its local rank."""
    visible = [text for text in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if text]
    return visible.index(str(gpu_ids[0])) if gpu_ids and str(gpu_ids[0]) in visible else local_rank


def explain(failure: BaseException | None, config: RunConfig) -> DistFtError:
    """Return one line for what Ray Train raised: the relay knows nothing, so it is about placing or Ray itself."""
    said = "ended without a result" if failure is None else f"failed ({line_of(failure, -1)})"
    return WorkerError(f"run {config.run.name}: the workers {said}; see the Ray logs in /tmp/ray; what was committed "
                       "is kept; the same command goes on from there")


def line_of(error: BaseException, index: int) -> str:
    """Return a line of an error's text (the last, of a remote traceback, is the error); without text, its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[index]
