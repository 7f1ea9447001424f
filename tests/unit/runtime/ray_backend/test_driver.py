"""Parts of the Ray runtime that need no cluster."""

from __future__ import annotations

from typing import Any
from unittest.mock import MagicMock

from dist_ft.runtime.ray_backend.driver import _start_coordinator


def test_coordinator_runs_on_the_drivers_node():
    """Another node may be lost at any time; without its coordinator the run would end."""
    options_used: dict[str, Any] = {}
    actor = MagicMock()
    actor.options = lambda **options: options_used.update(options) or actor
    ray = MagicMock(remote=lambda **_: lambda _: actor)
    ray.get_runtime_context().get_node_id.return_value = "ab" * 28
    _start_coordinator(ray, "coordinator", 3)
    strategy = options_used["scheduling_strategy"]
    assert (
        strategy.node_id == "ab" * 28
        and not strategy.soft
        and options_used["name"] == "coordinator"
    )
