"""Checks of this machine's CPUs, GPUs, folders and notifications before a run.

Skipped where the run goes to another cluster.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import get_args

from dist_ft.config.schema import RunConfig
from dist_ft.core import private_folders
from dist_ft.core.errors import FolderError
from dist_ft.core.world import World
from dist_ft.model.loading.download import CachePart, cache_root
from dist_ft.storage import filesystem
from dist_ft.training.notify.channels import url_problem


def check_cpus(config: RunConfig) -> Iterator[str]:
    """Yield a line if this machine has too few CPUs."""
    if not _runs_here(config):
        return

    # The fewest workers of an elastic run: it starts with these, and others may join later.
    num_cpus = os.cpu_count() or 1
    workers = _workers_here(config)
    if workers * config.cluster.cpus_per_worker > num_cpus:
        yield (
            f"cluster.workers={config.min_workers}: needs {workers} × "
            f"{config.cluster.cpus_per_worker:g} CPUs (cluster.cpus_per_worker), and this machine "
            f"has {num_cpus}. Use fewer workers or fewer CPUs per worker, or set cluster.address "
            "to a larger Ray cluster."
        )


def check_gpus(config: RunConfig) -> Iterator[str]:
    """Yield a line if this machine has too few GPUs."""
    if not config.cluster.gpus_per_worker or not _runs_here(config):
        return

    import torch

    # At least one, because `cluster.workers` 0 means one process, which uses a GPU too.
    num_gpus = torch.cuda.device_count()
    needed = max(1, _workers_here(config))
    if num_gpus < needed:
        yield (
            f"cluster.gpus_per_worker={config.cluster.gpus_per_worker}: {needed} GPUs are needed, "
            f"and this machine has {num_gpus} that torch can use. Set it to 0 to run on CPUs, or "
            "set cluster.address to a Ray cluster with GPUs."
        )


def check_notifications(config: RunConfig) -> Iterator[str]:
    """Yield a line for each channel of log.notify that cannot work from this machine."""
    notify = config.log.notify
    if notify.webhook_env:
        field = f"log.notify.webhook_env={notify.webhook_env}"
        url = os.environ.get(notify.webhook_env, "")
        if not url:
            yield (
                f"{field}: this environment variable is not set here. It must hold the URL of the "
                "webhook. Set it, or remove the field."
            )
        elif url_problem(url):
            yield (
                f"{field}: {url_problem(url)}. It must hold the URL of the webhook, such as "
                "https://host/path. Correct the variable."
            )

    if notify.command and shutil.which(notify.command[0]) is None:
        yield (
            f"log.notify.command: {notify.command[0]} is no program that can be run here. Allowed: "
            "the path of a program, or the name of one in PATH. Correct it, or make the file "
            "executable."
        )


def check_folders(config: RunConfig) -> Iterator[str]:
    """Yield a line for each folder of this machine that others own or may write to."""
    if not _runs_here(config):
        return

    # Nothing is created: a check leaves the machine as it is.
    cache = cache_root(config.data.cache_dir)
    checks = [partial(private_folders.require_safe, cache, "data.cache_dir")]
    for part in get_args(CachePart):
        checks.append(partial(private_folders.require_own_part, cache, part, "data.cache_dir"))
    if config.checkpoint.local_folder:
        folder = Path(filesystem.local_path(config.checkpoint.local_folder))
        checks.append(partial(private_folders.require_safe, folder, "checkpoint.local_folder"))
    if config.zero.nvme_path:
        folder = Path(config.zero.nvme_path).expanduser()
        checks.append(partial(private_folders.require_safe, folder, "zero.nvme_path"))

    for check in checks:
        try:
            check()
        except FolderError as error:
            yield str(error)


def _runs_here(config: RunConfig) -> bool:
    """Return whether the run uses this machine: one process, torchrun, or a local Ray."""
    # Without an address the driver starts a Ray of its own on this machine.
    own_ray = config.cluster.address is None and not os.environ.get("RAY_ADDRESS")
    return _is_torchrun_rank() or config.max_workers == 0 or own_ray


def _workers_here(config: RunConfig) -> int:
    """Return how many workers this machine must hold, if the run uses it."""
    # torchrun starts a process for each rank of a node; the other ranks are on other nodes.
    if _is_torchrun_rank():
        return World.from_environment().ranks_per_node
    return config.min_workers


def _is_torchrun_rank() -> bool:
    """Return whether torchrun (or the like) started this process as one of its ranks."""
    return "RANK" in os.environ
