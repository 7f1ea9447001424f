"""How many weights a ZeRO-3 worker has whole at once: DeepSpeed's fetching and releasing, played over the modules.

Source: the rules of DeepSpeed 0.19's parameter coordinator. A module's weights are gathered before it runs, further
ones ahead of it up to `prefetch` elements while fewer than `max_live` are whole; after it they are let go, unless they
are used again within the next `max_reuse` elements of the way (forward, then backward), or are small enough to stay
(`persistent`). Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from dist_ft.planning.model_shape import ModelShape


@dataclass(frozen=True)
class Limits:
    """DeepSpeed's, in elements; its defaults."""

    prefetch: int = 50_000_000
    persistent: int = 100_000
    max_live: int = 1_000_000_000
    max_reuse: int = 1_000_000_000

    @classmethod
    def of(cls, zero: Mapping[str, Any]) -> Limits:
        """Return those of the mapping `zero_optimization` of a DeepSpeed config."""
        names = {
            "prefetch": "stage3_prefetch_bucket_size",
            "persistent": "stage3_param_persistence_threshold",
            "max_live": "stage3_max_live_parameters",
            "max_reuse": "stage3_max_reuse_distance",
        }
        return cls(
            **{
                field: int(zero[name])
                for field, name in names.items()
                if isinstance(zero.get(name), int | float)
            }
        )


@dataclass(frozen=True)
class Gathered:
    """In elements: `persistent` at all times, `most` at the peak (those included), `at_once` of the largest gather."""

    persistent: int
    most: int
    at_once: int


@lru_cache(maxsize=8)
def play(shape: ModelShape, limits: Limits) -> Gathered:
    """Return what a forward and backward have whole; see the module."""
    numel = [weight.numel for weight in shape.weights]
    small = {index for index, size in enumerate(numel) if size <= limits.persistent}
    steps = [*shape.order, *reversed(shape.order)]
    uses: list[list[int]] = [[] for _ in numel]
    for step, module in enumerate(steps):
        for index in module:
            uses[index].append(step)
    so_far = [0]
    for module in steps:
        so_far.append(so_far[-1] + sum(numel[index] for index in module))
    whole, ahead = set(small), 0
    held = most = sum(numel[index] for index in small)
    persistent, at_once = held, 0
    for step, module in enumerate(steps):
        fetched = [index for index in module if index not in whole]
        ahead = max(ahead, step + 1)
        live = held - persistent + sum(numel[index] for index in fetched)
        early: list[int] = []
        room = min(limits.max_live - live, limits.prefetch)
        while ahead < len(steps) and sum(numel[index] for index in early) < room:
            early += [
                index
                for index in steps[ahead]
                if index not in whole and index not in early and index not in fetched
            ]
            ahead += 1
        for group in (fetched, early):
            whole.update(group)
            size = sum(numel[index] for index in group)
            held, at_once = held + size, max(at_once, size)
        most = max(most, held)
        for index in module:
            later = next((use for use in uses[index] if use > step), None)
            near = later is not None and (
                so_far[later] - so_far[step + 1] < limits.max_reuse or later < ahead
            )
            if index in whole and index not in small and not near:
                whole.remove(index)
                held -= numel[index]
    return Gathered(persistent, most, at_once)
