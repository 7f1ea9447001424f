"""Logs GPUs of the cluster that a run leaves idle, and GPUs that its workers wait for."""

from __future__ import annotations

import logging
import time
from typing import Any

from dist_ft.config.schema import RunConfig
from dist_ft.runtime.bootstrap import devices

FIRST_NOTICE_S = 10.0
"""Workers usually start within this time, so a shortage is not worth a line before."""

log = logging.getLogger("dist_ft.ray")


class GpuWatch:
    """What the driver says about the cluster's GPUs."""

    def __init__(self, ray: Any, config: RunConfig) -> None:
        """Log idle GPUs; before the workers start, the free ones are those of no job."""
        self._ray = ray
        self._config = config
        self._started_at = time.monotonic()
        self._is_done = False

        free = devices.free_gpus_by_node(ray.nodes(), ray.available_resources())
        line = devices.idle_in_cluster(config, free)
        if line:
            log.warning("%s", line)

    def check(self, has_started: bool) -> None:
        """Log once if workers wait for GPUs; `has_started`: a worker gave a sign of life."""
        if has_started:
            self._is_done = True
        if self._is_done or time.monotonic() - self._started_at < FIRST_NOTICE_S:
            return

        self._is_done = True
        line = devices.shortage(
            self._config, self._ray.cluster_resources(), self._ray.available_resources()
        )
        if line:
            log.warning("%s", line)
