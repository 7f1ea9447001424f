"""Optimizers for every engine: the same torch classes, so that all engines compute the same update.

AdamW and SGD are element-wise and therefore exact on any flat partition of the parameters. Adafactor is not, and is
used only where whole parameters are at hand.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from dist_ft.config.schema import OptimizerSection
from dist_ft.core.errors import ModelError

_LAYER = re.compile(r"(.*?)\.(\d+)\.")
_EMBEDDING = re.compile(r"embed|wte|wpe|shared")
STATE_KEYS = {"adamw": ("exp_avg", "exp_avg_sq"), "sgd": ("momentum_buffer",)}


def has_weight_decay(shape: Iterable[int]) -> bool:
    """Tell whether a parameter of this shape decays: matrices do, biases and norms (and IA3's scales) do not."""
    return sum(size > 1 for size in shape) > 1


def param_groups(
    parameters: Mapping[str, nn.Parameter],
    weight_decay: float,
    by_depth: bool = False,
    exempt: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Return groups with and without weight decay, in the order of `parameters`; empty groups are left out.

    Names that match a pattern of `exempt` do not decay; raises ModelError for one that none matches. With `by_depth`
    each depth has its own (`depths`), for `set_learning_rate`. ZeRO-3 parameters are empty outside of a
    gather; `ds_shape` is their shape.
    """
    learned = {name: p for name, p in parameters.items() if p.requires_grad}
    for pattern in exempt:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in learned):
            raise ModelError(
                f"optimizer.decay_exempt={pattern}: no weight that learns has such a name; there are "
                f"{', '.join(list(learned)[:3])}, ...; correct it"
            )
    places = layer_depths(parameters) if by_depth else dict.fromkeys(parameters, 0)
    groups: dict[tuple[int, bool], dict[str, Any]] = {
        (depth, decaying): {
            "params": [],
            "weight_decay": weight_decay if decaying else 0.0,
            "depth": depth,
        }
        for depth in sorted(set(places.values()))
        for decaying in (True, False)
    }
    for name, parameter in learned.items():
        named = any(fnmatch.fnmatchcase(name, pattern) for pattern in exempt)
        decaying = has_weight_decay(getattr(parameter, "ds_shape", parameter.shape)) and not named
        groups[places[name], decaying]["params"].append(parameter)
    return [group for group in groups.values() if group["params"]]


def layer_depths(names: Iterable[str]) -> dict[str, int]:
    """Return how far each weight lies below the output: 0 what comes after the layers, then layers, then embeddings."""
    found = {name: _LAYER.match(name) for name in names}
    tops: dict[str, int] = {}
    for match in filter(None, found.values()):
        tops[match[1]] = max(tops.get(match[1], 0), int(match[2]))
    deepest = max(tops.values(), default=0) + 2
    return {
        name: tops[match[1]] - int(match[2]) + 1
        if match
        else deepest * bool(_EMBEDDING.search(name))
        for name, match in found.items()
    }


def build_optimizer(groups: list[dict[str, Any]], section: OptimizerSection) -> torch.optim.Optimizer:
    """Return the optimizer of `section` over `groups`; the learning rate is set anew each step."""
    if section.name == "adamw":
        return torch.optim.AdamW(
            groups,
            lr=section.learning_rate,
            betas=(section.beta1, section.beta2),
            eps=section.eps,
            fused=True,
        )
    if section.name == "sgd":
        return torch.optim.SGD(groups, lr=section.learning_rate, momentum=section.momentum)
    return torch.optim.Adafactor(groups, lr=section.learning_rate)


def create_state(
    optimizer: torch.optim.Optimizer, name: str, momentum: float, tensors: Iterable[torch.Tensor]
) -> None:
    """Create the state torch would create at the first step, so that it can be loaded and saved before it."""
    if name == "adafactor":
        return _step_of_size_zero(optimizer)
    for tensor in tensors:
        state = optimizer.state[tensor]
        if name == "adamw" and "exp_avg" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=tensor.device)
            state["exp_avg"], state["exp_avg_sq"] = (
                torch.zeros_like(tensor),
                torch.zeros_like(tensor),
            )
        elif name == "sgd" and momentum and state.get("momentum_buffer") is None:
            state["momentum_buffer"] = torch.zeros_like(tensor)
    return None


def _step_of_size_zero(optimizer: torch.optim.Optimizer) -> None:
    """Make the optimizer create its own state; the parameters, and what the first real step does, stay as they are."""
    decay = [group["weight_decay"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"], group["weight_decay"] = 0.0, 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    for group, value in zip(optimizer.param_groups, decay, strict=True):
        group["weight_decay"] = value
    set_step(optimizer, 0)


def set_step(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Set the update count the optimizer keeps for its bias correction."""
    for state in optimizer.state.values():
        if torch.is_tensor(state.get("step")):
            state["step"].fill_(float(step))


def set_learning_rate(
    optimizer: Any, learning_rate: float, of_depth: Callable[[int], float] | None = None
) -> None:
    """Set the learning rate of every group, times what `of_depth` says of its depth."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * (1.0 if of_depth is None else of_depth(group["depth"]))
