"""Notices lost nodes, and makes Ray count its nodes again. Does not import Ray."""

from __future__ import annotations

import contextlib
import logging
from typing import Any

log = logging.getLogger("dist_ft.ray")
NODE_COUNTER = "AutoscalingCoordinator"
"""Name and namespace of Ray's actor that knows the free nodes; no public part of Ray."""
RECOUNT_TIMEOUT_S = 5.0


class NodeWatch:
    """Logs lost nodes."""

    def __init__(self, ray: Any) -> None:
        self._ray = ray
        self._alive: set[str] = set()

    def check(self) -> None:
        """Log how many nodes were lost since the last call."""
        # By id: a node that is lost and one that joins leave the number unchanged.
        alive = {node["NodeID"] for node in self._ray.nodes() if node["Alive"]}
        lost = self._alive - alive
        if lost:
            log.info("%d nodes were lost", len(lost))

        self._alive = alive


def recount_nodes(ray: Any) -> None:
    """Make Ray Train notice at once which nodes are left; by itself it takes up to 20 s.

    Call it when workers have failed, before new ones are requested. With a Ray that has no such
    actor the restart takes longer.
    """
    # Never raises: this runs in Ray Train's controller, and only saves time.
    with contextlib.suppress(Exception):
        counter = ray.get_actor(NODE_COUNTER, namespace=NODE_COUNTER)
        ray.get(
            counter.get_reserved_resources.remote("dist_ft", recompute=True),
            timeout=RECOUNT_TIMEOUT_S,
        )
