"""Timeouts of collectives, longer than the time without progress that the watchdog allows.

NCCL's own watchdog ends every process of a group whose collective takes too long, by SIGABRT and
without a name. So it must come after ours (`bootstrap.watchdog`), which names the worker and stores
its stacks. That concerns all groups: torch gives a new nccl group 10 minutes whatever the first
group has, and DeepSpeed's collectives use a group of its own.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Iterator
from datetime import timedelta

from dist_ft.config.sections.cluster import HEARTBEAT_VARIABLE, ClusterSection

log = logging.getLogger("dist_ft.network")
DEFAULTS = ("default_pg_timeout", "default_pg_nccl_timeout")
"""Variables of torch with the timeouts of groups that are created without one: no public part."""


@contextlib.contextmanager
def apply(cluster: ClusterSection) -> Iterator[timedelta]:
    """Within this context new process groups have the timeout of `cluster`; yields it.

    Call it before the first group is created: NCCL reads its variable then.
    """
    _set_heartbeat(cluster)
    timeout = timedelta(seconds=cluster.group_timeout_s)

    import torch.distributed.distributed_c10d as c10d

    # A torch without these variables has its own defaults; the first group has its timeout anyway.
    before = {name: getattr(c10d, name) for name in DEFAULTS if hasattr(c10d, name)}
    for name in before:
        setattr(c10d, name, timeout)
    try:
        yield timeout
    finally:
        for name, value in before.items():
            setattr(c10d, name, value)


def _set_heartbeat(cluster: ClusterSection) -> None:
    """Have torch wait longer for its NCCL watchdog (by default 480 s) than ours for progress."""
    if not cluster.progress_timeout_s:
        return

    needed_s = math.ceil(cluster.group_timeout_s)
    text = os.environ.get(HEARTBEAT_VARIABLE, "")
    if not text.isdigit():
        os.environ[HEARTBEAT_VARIABLE] = str(needed_s)

    # Of the environment of the machine: a value in the config is checked with it.
    elif int(text) < cluster.progress_timeout_s:
        log.warning(
            "%s=%s of the environment is shorter than cluster.progress_timeout_s=%g; %d is used, "
            "so that a worker that hangs is named first",
            HEARTBEAT_VARIABLE,
            text,
            cluster.progress_timeout_s,
            needed_s,
        )
        os.environ[HEARTBEAT_VARIABLE] = str(needed_s)
