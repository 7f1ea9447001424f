"""State slices of the flat partitions of ZeRO-1 and ZeRO-2.

DeepSpeed's mapping is accessed by attribute name; DeepSpeed is not imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn

from dist_ft.engine.base import StateSlice


def flat_slice(
    name: str, key: str, offset: int, numel: int, get_flat: Callable[[], torch.Tensor]
) -> StateSlice:
    """Return a slice of the first `numel` elements of the flat tensor that `get_flat` returns."""

    def write(values: torch.Tensor) -> None:
        get_flat()[:numel].copy_(values)

    return StateSlice(name, key, offset, numel, True, lambda: get_flat()[:numel], write)


def stage12_slices(name: str, parameter: nn.Parameter) -> Iterator[StateSlice]:
    """Iterate over the slices of a parameter, which ZeRO-1 and 2 map onto a float32 partition."""
    mapping = parameter._hp_mapping  # type: ignore[attr-defined]
    if mapping is None:
        return  # this worker holds no part of it
    address = mapping.lp_fragment_address
    for key in (None, *mapping.get_optim_state_keys()):
        yield flat_slice(
            name,
            key or "param",
            address.start,
            address.numel,
            lambda key=key: mapping.get_hp_fragment(key).detach(),  # type: ignore[misc]
        )
