"""A run's metrics for Prometheus: gauges `ray_dist_ft_*` of Ray's exporters, tag `run`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

EXPORTED_KINDS = ("train", "evaluation")
"""Kinds of metrics lines that are exported; others would create a series per worker."""


class RunGauges:
    """The gauges of one run; used by rank 0's Ray worker."""

    def __init__(self, run: str) -> None:
        self._run = run
        self._gauges: dict[str, Any] = {}

    def set_values(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        """Set the gauges to the finite values of one step."""
        if kind not in EXPORTED_KINDS:
            return

        # A value that is not finite leaves its gauge as it was.
        for name, value in {"step": float(step), **values}.items():
            if math.isfinite(value):
                self._gauge(gauge_name(kind, name)).set(value)

    def _gauge(self, name: str) -> Any:
        # Created when first set, because a run's metrics are known only as they arrive.
        if name not in self._gauges:
            from ray.util.metrics import Gauge

            gauge = Gauge(name, description=f"{name} of a dist_ft run", tag_keys=("run",))
            gauge.set_default_tags({"run": self._run})
            self._gauges[name] = gauge

        return self._gauges[name]


def gauge_name(kind: str, name: str) -> str:
    """Return the name of a gauge: letters, digits and '_' only."""
    # Training metrics have no kind in their name, but others do: both have a loss.
    prefix = "dist_ft" if kind == "train" else f"dist_ft_{kind}"
    return re.sub(r"[^A-Za-z0-9_]", "_", f"{prefix}_{name}")
