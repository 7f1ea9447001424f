"""Experts that are modules of their own: which of them run depends on the tokens.

On one rank an expert may get no token and on another many. Its weights then have a gradient on some
ranks only, and ranks that reduce gradients one by one no longer agree on which: they hang, or add
gradients of different weights. So all experts of a layer take part in every pass: one without
tokens has a gradient of zero.

Most families of transformers hold the experts of a layer in one tensor, which has none of this.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.utils import stateless

MIN_EXPERTS = 2

log = logging.getLogger(__name__)


def expert_modules(model: nn.Module) -> list[nn.Module]:
    """Return the modules that call experts of their own, for each layer of a model.

    That is a container of experts with a forward of its own, or the owner of a plain container.
    """
    found: list[nn.Module] = []
    for owner in model.modules():
        for name, child in owner.named_children():
            if not _holds_experts(name, child):
                continue
            module = child if _has_forward(child) else owner
            # an adapter's wrapper holds the container again, under another name
            if not any(module is other for other in found):
                found.append(module)
    return found


def _holds_experts(name: str, module: nn.Module) -> bool:
    if not isinstance(module, nn.ModuleList | nn.ModuleDict) or len(module) < MIN_EXPERTS:
        return False
    return "expert" in name.lower() or "expert" in type(module).__name__.lower()


def _has_forward(container: nn.Module) -> bool:
    """Whether a container is called itself: ModuleList and ModuleDict have no forward."""
    return type(container).forward is not nn.Module.forward


def give_all_experts_gradients(model: nn.Module, is_sharded: bool = False) -> None:
    """Let every pass give all experts of a layer a gradient, in the same order on all ranks.

    `is_sharded`: by ZeRO-3.
    """
    for module in expert_modules(model):
        if is_sharded:
            # What `deepspeed.utils.set_z3_leaf_modules` sets: all weights of such a module are
            # gathered together, and reduced together with zeros for those that were not used.
            module._z3_leaf = True  # type: ignore[assignment]
            continue
        module.forward = _with_joined_weights(module)  # type: ignore[method-assign]


def _with_joined_weights(module: nn.Module) -> Callable[..., Any]:
    """Return a module's forward that reads its weights through `_JoinedWeights`."""
    original = module.forward

    def forward(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
        if not trainable or not torch.is_grad_enabled():
            return original(hidden, *args, **kwargs)

        hidden, *weights = _JoinedWeights.apply(hidden, *trainable.values())
        joined = dict(zip(trainable, weights, strict=True))
        with stateless._reparametrize_module(module, joined):
            output = original(hidden, *args, **kwargs)

        # no expert had a token: the layer must still take part in the backward pass
        if not output.requires_grad:
            output = output + 0.0 * hidden
        return output

    return forward


class _JoinedWeights(torch.autograd.Function):
    """The identity of a layer's input and weights, with one backward for all of them.

    A weight that was not used gets zeros, and the gradients of all weights become available at
    once, in a fixed order: ranks then reduce them in the same order.
    """

    @staticmethod
    def forward(ctx: Any, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return views of the tensors."""
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the gradients; autograd has replaced missing ones by zeros."""
        return gradients


def disable_layer_drop(model: nn.Module) -> None:
    """Disable layer drop, by which each rank would skip layers of its own."""
    largest = 0.0
    for module in model.modules():
        for name in ("layerdrop", "layer_drop"):
            probability = getattr(module, name, None)
            if isinstance(probability, int | float) and probability > 0:
                largest = max(largest, float(probability))
                setattr(module, name, 0.0)

    if largest:
        log.info("layer drop (%g) is disabled: each rank would skip layers of its own", largest)
