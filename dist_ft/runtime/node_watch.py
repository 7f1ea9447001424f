"""Sees that a node was lost, and has Ray count its nodes anew. Is given Ray; does not import it."""

from __future__ import annotations

import contextlib
import logging
from typing import Any

log = logging.getLogger("dist_ft.ray")
COUNTER = "AutoscalingCoordinator"
"""Ray's actor that tells Ray Train where workers may go, and its namespace; no public part of Ray."""


class NodeWatch:
    """Looks for lost nodes. By itself Ray offers Ray Train a lost node for up to 20 s more."""

    def __init__(self, ray: Any) -> None:
        self._ray = ray
        self._alive: set[str] = set()

    def look(self) -> None:
        """Ask for the nodes; if one is gone, for a new count. With a Ray that has no such counter it takes longer."""
        alive = {node["NodeID"] for node in self._ray.nodes() if node["Alive"]}
        if self._alive - alive:
            log.info("%d nodes were lost", len(self._alive - alive))
            with contextlib.suppress(Exception):
                self._ray.get_actor(COUNTER, namespace=COUNTER).get_reserved_resources.remote("dist_ft", recompute=True)
        self._alive = alive
