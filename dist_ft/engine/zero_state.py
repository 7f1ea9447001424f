"""Slots of what ZeRO-1 and 2 hold flat on each worker. Knows DeepSpeed's mapping by name, without importing it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from dist_ft.engine.base import StateSlice


def flat_slice(name: str, key: str, offset: int, numel: int, view: Any) -> StateSlice:
    """Return a slot of the first `numel` elements of the flat tensor that `view` gives."""

    def write(values: torch.Tensor) -> None:
        view()[:numel].copy_(values)

    return StateSlice(name, key, offset, numel, True, lambda: view()[:numel], write)


def stage12_slices(name: str, parameter: nn.Parameter) -> Iterator[StateSlice]:
    """ZeRO-1 and 2 map each parameter onto a flat float32 partition of its group."""
    mapping = parameter._hp_mapping  # type: ignore[attr-defined]
    if mapping is None:
        return  # no part of it lies on this worker
    address = mapping.lp_fragment_address
    for key in (None, *mapping.get_optim_state_keys()):
        yield flat_slice(
            name,
            key or "param",
            address.start,
            address.numel,
            lambda key=key: mapping.get_hp_fragment(key).detach(),
        )
