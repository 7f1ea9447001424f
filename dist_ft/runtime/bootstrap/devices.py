"""Which device a process uses, whether it is the one that it was assigned, and which GPUs idle."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from dist_ft.config.schema import RunConfig
from dist_ft.core.errors import WorkerError

USE_GPUS = "Set cluster.gpus_per_worker=1 to train on them"


def describe_device(config: RunConfig, num_ranks: int) -> str:
    """Return the device of this process, as the start table shows it.

    Args:
        config: the run.
        num_ranks: number of workers.
    """
    if not config.cluster.gpus_per_worker:
        return "CPU" if num_ranks == 1 else f"{num_ranks} workers on CPUs"

    import torch

    name = torch.cuda.get_device_name()
    if num_ranks == 1:
        return f"GPU {torch.cuda.current_device()}, {name}"
    return f"{num_ranks} workers with a GPU each, {name}"


def require_device(index: int) -> None:
    """Check that torch can use the GPU that this process was assigned.

    `index`: of the GPU among those that are visible to the process.

    Raises:
        WorkerError: it cannot; the process would use another device, or none.
    """
    import torch

    count = torch.cuda.device_count()
    if index < count:
        return

    assigned = f"GPU {index}"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        assigned += f" of CUDA_VISIBLE_DEVICES={visible!r}"

    if not torch.backends.cuda.is_built():
        problem = f"torch {torch.__version__} is built without CUDA. Install a CUDA build"
    elif count == 0:
        problem = "torch sees no GPU. Check the driver of the node"
    else:
        problem = f"torch sees {count} GPUs. Start at most one process for each"
    raise WorkerError(
        f"cluster.gpus_per_worker=1: this process was assigned {assigned}, but {problem}, or set "
        "cluster.gpus_per_worker=0 to train on CPUs"
    )


def idle_here(config: RunConfig, num_ranks: int = 1) -> str:
    """Return a line about GPUs of this machine that a run leaves idle; "": none.

    `num_ranks`: processes of the run on this machine.
    """
    import torch

    count = torch.cuda.device_count()
    if config.cluster.gpus_per_worker:
        if count <= num_ranks:
            return ""
        return (
            f"this machine has {count} GPUs, and the run uses {num_ranks}. Set "
            f"cluster.workers={count} to use all, if the lanes allow it"
        )

    if not count:
        return ""
    plural = "" if count == 1 else "s"
    return f"this machine has {count} GPU{plural}, and the run trains on its CPU. {USE_GPUS}"


def idle_in_cluster(config: RunConfig, free_gpus: Mapping[str, float]) -> str:
    """Return a line about GPUs of a cluster that a run leaves idle; "": none.

    `free_gpus`: GPUs that no other job uses, by name of the node.
    """
    num_free = int(sum(free_gpus.values()))
    num_used = config.max_workers * config.cluster.gpus_per_worker
    if num_free <= num_used:
        return ""

    nodes = ", ".join(f"{name} {count:g}" for name, count in sorted(free_gpus.items()) if count)
    if not num_used:
        return (
            f"the cluster has {num_free} free GPUs ({nodes}), and the workers train on CPUs. "
            f"{USE_GPUS}"
        )
    return (
        f"the cluster has {num_free} free GPUs ({nodes}), and the run uses {num_used} of them. "
        f"Raise cluster.workers={config.max_workers} to use more"
    )


def free_gpus_by_node(nodes: list[dict[str, Any]], free: Mapping[str, float]) -> dict[str, float]:
    """Return the GPUs that are free on each node, as far as Ray tells.

    Args:
        nodes: `ray.nodes()`.
        free: `ray.available_resources()`, which sums over all nodes.
    """
    by_node = {}
    for node in nodes:
        count = node["Resources"].get("GPU", 0.0)
        if node["Alive"] and count:
            by_node[str(node.get("NodeManagerHostname") or node["NodeID"][:8])] = count

    # Ray does not say on which nodes the others run: with any in use, only the sum is known.
    total = sum(by_node.values())
    num_free = free.get("GPU", 0.0)
    if num_free < total:
        return {"all nodes together": num_free}
    return by_node


def shortage(config: RunConfig, total: Mapping[str, float], free: Mapping[str, float]) -> str:
    """Return a line about workers that wait for GPUs which other jobs use; "": they do not.

    Args:
        config: the run.
        total: `ray.cluster_resources()`.
        free: `ray.available_resources()`.
    """
    needed = config.min_workers * config.cluster.gpus_per_worker
    num_free = free.get("GPU", 0.0)
    if not needed or num_free >= needed:
        return ""
    return (
        f"waiting for GPUs: {config.min_workers} workers need {needed}, and {num_free:g} of "
        f"{total.get('GPU', 0.0):g} are free; other jobs use the rest. Wait, end one of them, or "
        "lower cluster.workers"
    )
