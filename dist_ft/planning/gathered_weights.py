"""How many weights a ZeRO-3 worker holds whole at once: a simulation of DeepSpeed's gathering.

Source: the rules of DeepSpeed 0.19's parameter coordinator. A module's weights are gathered before
it runs, and further ones are prefetched, up to `prefetch` elements and while fewer than `max_live`
are whole. After the module, its weights are released, unless they are used again within the next
`max_reuse` elements (forward, then backward) or are small enough to stay (`persistent`). Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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

        # what is not a number leaves DeepSpeed's default; JSON may hold 5e7, which is a float
        configured = {}
        for field, name in names.items():
            if isinstance(zero.get(name), int | float):
                configured[field] = int(zero[name])
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


# cached: the number of workers does not matter here, and a plan tries many of them
@lru_cache(maxsize=8)
def simulate(shape: ModelShape, limits: Limits) -> GatheredWeights:
    """Return the weights that a forward and backward pass hold whole; see the module."""
    numel = [weight.numel for weight in shape.weights]
    small = {index for index, size in enumerate(numel) if size <= limits.persistent}
    steps = [*shape.order, *reversed(shape.order)]  # forward, then backward

    def total(indices: Iterable[int]) -> int:
        return sum(numel[index] for index in indices)

    uses: list[list[int]] = [[] for _ in numel]  # the steps that use each weight
    elements_before = [0]  # each step
    for step, module in enumerate(steps):
        for index in module:
            uses[index].append(step)
        elements_before.append(elements_before[-1] + total(module))

    # `held` counts the elements of `whole`: the persistent weights, and those gathered for now
    whole = set(small)
    persistent = total(small)
    held = most = persistent
    at_once = 0
    next_prefetch = 0  # the first step that no prefetch has reached
    for step, module in enumerate(steps):
        needed = [index for index in module if index not in whole]

        # Prefetch whole modules while there is room. The last one may exceed it: DeepSpeed checks
        # its limits before it adds weights, not after.
        next_prefetch = max(next_prefetch, step + 1)
        live = held - persistent + total(needed)
        room = min(limits.max_live - live, limits.prefetch)
        prefetched: list[int] = []
        while next_prefetch < len(steps) and total(prefetched) < room:
            for index in steps[next_prefetch]:
                if index not in whole and index not in prefetched and index not in needed:
                    prefetched.append(index)
            next_prefetch += 1

        # two all-gathers, each with a buffer of its own size
        for gathered in (needed, prefetched):
            size = total(gathered)
            whole.update(gathered)
            held += size
            at_once = max(at_once, size)
        most = max(most, held)

        # Release what is not used again soon. What a prefetch has reached already is gathered for
        # its next use.
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
