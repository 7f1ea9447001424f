"""How many weights a ZeRO-3 worker holds whole at once: a simulation of DeepSpeed's gathering.

Source: the rules of DeepSpeed 0.19's parameter coordinator. A module's weights are gathered before
it runs, and further ones are prefetched, up to `prefetch` elements and while fewer than `max_live`
are whole. After the module, its weights are released, unless they are used again within the next
`max_reuse` elements (forward, then backward) or are small enough to stay (`persistent`). Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from dist_ft.planning.model_shape import ModelShape


@dataclass(frozen=True)
class Limits:
    """DeepSpeed's limits in elements, with its defaults.

    Attributes:
        prefetch: elements of weights that are gathered ahead.
        persistent: size up to which a weight is never released.
        max_live: maximum elements of gathered weights.
        max_reuse: distance to the next use within which a weight is not released.
    """

    prefetch: int = 50_000_000
    persistent: int = 100_000
    max_live: int = 1_000_000_000
    max_reuse: int = 1_000_000_000

    @classmethod
    def from_config(cls, zero: Mapping[str, Any]) -> Limits:
        """Return the limits in the mapping `zero_optimization` of a DeepSpeed config."""
        names = {
            "prefetch": "stage3_prefetch_bucket_size",
            "persistent": "stage3_param_persistence_threshold",
            "max_live": "stage3_max_live_parameters",
            "max_reuse": "stage3_max_reuse_distance",
        }
        configured = {
            field: int(zero[name])
            for field, name in names.items()
            if isinstance(zero.get(name), int | float)
        }
        return cls(**configured)


@dataclass(frozen=True)
class GatheredWeights:
    """Elements that are whole at once.

    Attributes:
        persistent: at all times.
        most: at the peak, including `persistent`.
        at_once: elements of the largest single gather.
    """

    persistent: int
    most: int
    at_once: int


@lru_cache(maxsize=8)
def simulate(shape: ModelShape, limits: Limits) -> GatheredWeights:
    """Return the weights that a forward and backward pass hold whole; see the module."""
    numel = [weight.numel for weight in shape.weights]
    small = {index for index, size in enumerate(numel) if size <= limits.persistent}
    steps = [*shape.order, *reversed(shape.order)]  # forward, then backward

    uses: list[list[int]] = [[] for _ in numel]  # the steps that use each weight
    for step, module in enumerate(steps):
        for index in module:
            uses[index].append(step)
    elements_before = [0]  # each step
    for module in steps:
        elements_before.append(elements_before[-1] + sum(numel[index] for index in module))

    whole = set(small)
    persistent = sum(numel[index] for index in small)
    held = most = persistent
    at_once = 0
    next_prefetch = 0  # the first step that no prefetch has reached
    for step, module in enumerate(steps):
        needed = [index for index in module if index not in whole]

        # prefetch whole modules while there is room
        next_prefetch = max(next_prefetch, step + 1)
        live = held - persistent + sum(numel[index] for index in needed)
        room = min(limits.max_live - live, limits.prefetch)
        prefetched: list[int] = []
        while next_prefetch < len(steps) and sum(numel[index] for index in prefetched) < room:
            prefetched += [
                index
                for index in steps[next_prefetch]
                if index not in whole and index not in prefetched and index not in needed
            ]
            next_prefetch += 1

        for gathered in (needed, prefetched):
            size = sum(numel[index] for index in gathered)
            whole.update(gathered)
            held += size
            at_once = max(at_once, size)
        most = max(most, held)

        # release what is not used again soon
        for index in module:
            next_use = next((use for use in uses[index] if use > step), None)
            is_used_soon = next_use is not None and (
                elements_before[next_use] - elements_before[step + 1] < limits.max_reuse
                or next_use < next_prefetch
            )
            if index in whole and index not in small and not is_used_soon:
                whole.remove(index)
                held -= numel[index]
    return GatheredWeights(persistent, most, at_once)
