"""Sees that nodes were lost, and has Ray count its nodes anew. Is given Ray; does not import it."""

from __future__ import annotations

import contextlib
import logging
from typing import Any

log = logging.getLogger("dist_ft.ray")
COUNTER = "AutoscalingCoordinator"
"""Ray's actor that tells Ray Train where workers may go, and its namespace; no public part of Ray."""
COUNT_S = 5.0


class NodeWatch:
    """Tells of lost nodes."""

    def __init__(self, ray: Any) -> None:
        self._ray = ray
        self._alive: set[str] = set()

    def look(self) -> None:
        """Ask for the nodes, and log how many are gone since the last call."""
        alive = {node["NodeID"] for node in self._ray.nodes() if node["Alive"]}
        if self._alive - alive:
            log.info("%d nodes were lost", len(self._alive - alive))
        self._alive = alive


def count_anew(ray: Any) -> None:
    """Have Ray Train know which nodes are left: by itself Ray offers it a lost one for up to 20 s more.

    To be called when workers failed, before others are asked for. With a Ray that has no such counter it takes longer.
    """
    with contextlib.suppress(Exception):
        counter = ray.get_actor(COUNTER, namespace=COUNTER)
        ray.get(counter.get_reserved_resources.remote("dist_ft", recompute=True), timeout=COUNT_S)
