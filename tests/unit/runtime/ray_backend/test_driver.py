"""The parts of the Ray runtime that need no cluster."""

from __future__ import annotations

from typing import Any
from unittest.mock import MagicMock

from dist_ft.runtime.ray_backend.driver import _start_relay


def test_the_relay_stays_on_the_drivers_node():
    """Another node may be lost at any time; with its relay a run would end."""
    asked: dict[str, Any] = {}
    actor = MagicMock()
    actor.options = lambda **options: asked.update(options) or actor
    ray = MagicMock(remote=lambda **_: lambda _: actor)
    ray.get_runtime_context().get_node_id.return_value = "ab" * 28
    _start_relay(ray, "relay", 3)
    strategy = asked["scheduling_strategy"]
    assert strategy.node_id == "ab" * 28 and not strategy.soft and asked["name"] == "relay"
