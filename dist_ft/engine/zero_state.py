"""State slices of the partitions of ZeRO-1, ZeRO-2 and ZeRO-3.

Every worker holds its own elements, so it owns (saves) all slices it lists. DeepSpeed's mapping is
accessed by attribute name; DeepSpeed is not imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from dist_ft.engine.base import StateSlice


def flat_slice(
    name: str, key: str, offset: int, numel: int, get_flat: Callable[[], torch.Tensor]
) -> StateSlice:
    """Return a slice of the first `numel` elements of the flat tensor that `get_flat` returns."""

    # DeepSpeed may replace its tensors, so each access gets the current one.
    def read() -> torch.Tensor:
        return get_flat()[:numel]

    def write(values: torch.Tensor) -> None:
        get_flat()[:numel].copy_(values)

    return StateSlice(name, key, offset, numel, True, read, write)


def stage12_slices(name: str, parameter: nn.Parameter) -> Iterator[StateSlice]:
    """Iterate over the slices of a parameter, which ZeRO-1 and 2 map onto a float32 partition."""
    mapping = parameter._hp_mapping  # type: ignore[attr-defined]
    if mapping is None:
        return  # this worker holds no part of it

    # A partition cuts the flat sequence of all parameters anywhere, also inside a parameter.
    address = mapping.lp_fragment_address

    # To DeepSpeed the key None means the float32 weights.
    for key in (None, *mapping.get_optim_state_keys()):
        yield flat_slice(
            name,
            key or "param",
            address.start,
            address.numel,
            lambda key=key: mapping.get_hp_fragment(key).detach(),  # type: ignore[misc]
        )


def stage3_slices(
    name: str, parameter: nn.Parameter, rank: int, state_keys: Sequence[str], utils: Any
) -> Iterator[StateSlice]:
    """Iterate over the slices of a parameter that ZeRO-3 shards.

    Rank r holds the flat elements from r * ds_tensor.ds_numel. The last ranks also hold padding,
    which is omitted.

    Args:
        name: name of the parameter.
        parameter: the parameter, with DeepSpeed's attributes.
        rank: this worker's.
        state_keys: keys of the optimizer state.
        utils: the module `deepspeed.utils`.
    """
    partition_numel = parameter.ds_tensor.ds_numel  # type: ignore[attr-defined]
    offset = rank * partition_numel
    numel = min(partition_numel, parameter.ds_numel - offset)  # type: ignore[attr-defined]
    if numel <= 0:
        return

    # DeepSpeed keeps no float32 copy of a weight that is not trained.
    if not parameter.requires_grad:
        yield flat_slice(name, "frozen", offset, numel, lambda: parameter.ds_tensor.data)  # type: ignore
        return

    def partition_slice(key: str, get: Any, put: Any) -> StateSlice:
        def read() -> torch.Tensor:
            return get().detach()[:numel]

        def write(values: torch.Tensor) -> None:
            # `put` takes whole partitions only, so the padding is written back with the values.
            partition = get().detach().clone()
            partition[:numel] = values
            put(partition)

        return StateSlice(name, key, offset, numel, True, read, write)

    # With offload to NVMe, these functions read the state from disk and write it back.
    yield partition_slice(
        "param",
        lambda: utils.safe_get_local_fp32_param(parameter),
        lambda values: utils.safe_set_local_fp32_param(parameter, values),
    )
    for key in state_keys:
        yield partition_slice(
            key,
            lambda key=key: utils.safe_get_local_optimizer_state(parameter, key),
            lambda values, key=key: utils.safe_set_local_optimizer_state(parameter, values, key),
        )
