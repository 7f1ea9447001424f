"""Optimizers for all engines: the same torch classes, so that all engines compute the same update.

AdamW and SGD are element-wise, so they are exact on any flat partition of the parameters. Adafactor
is not, and is used only if a worker holds whole parameters.
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
    """Whether a parameter of this shape decays: matrices do.

    Biases, norms and IA3 scales do not.
    """
    # Dimensions of size 1 do not count: the scales of IA3 are stored as (1, H) or (H, 1).
    num_dimensions = sum(size > 1 for size in shape)
    return num_dimensions > 1


def param_groups(
    parameters: Mapping[str, nn.Parameter],
    weight_decay: float,
    group_by_depth: bool = False,
    exempt: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Return the nonempty groups with and without weight decay, in the order of `parameters`.

    Args:
        parameters: parameters by name. ZeRO-3 parameters are empty unless gathered; their shape is
            `ds_shape`.
        weight_decay: weight decay of the groups with weight decay.
        group_by_depth: separate groups for each depth (`layer_depths`), for `set_learning_rate`.
        exempt: patterns of the names of parameters without weight decay.

    Raises:
        ModelError: a pattern matches no trainable parameter.
    """
    trainable = {name: p for name, p in parameters.items() if p.requires_grad}
    _require_matches(exempt, trainable)

    # Depths count all layers, frozen ones too: a layer's rate does not depend on what is trained.
    depths = dict.fromkeys(parameters, 0)
    if group_by_depth:
        depths = layer_depths(parameters)

    # Groups are created in a fixed order before they are filled, because DeepSpeed's partitions
    # follow that order and must be the same on every rank and after a restart.
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for depth in sorted(set(depths.values())):
        for decaying, decay in ((True, weight_decay), (False, 0.0)):
            groups[depth, decaying] = {"params": [], "weight_decay": decay, "depth": depth}

    for name, parameter in trainable.items():
        is_exempt = any(fnmatch.fnmatchcase(name, pattern) for pattern in exempt)
        shape = getattr(parameter, "ds_shape", parameter.shape)
        decaying = has_weight_decay(shape) and not is_exempt
        groups[depths[name], decaying]["params"].append(parameter)

    # For example, a run that trains biases alone has no group with weight decay.
    return [group for group in groups.values() if group["params"]]


def _require_matches(patterns: Sequence[str], names: Iterable[str]) -> None:
    """Raise ModelError for the first pattern that matches none of `names`."""
    names = list(names)
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            raise ModelError(
                f"optimizer.decay_exempt={pattern}: matches no trainable weight. The weights are "
                f"{', '.join(names[:3])}, .... Correct the pattern."
            )


def layer_depths(names: Iterable[str]) -> dict[str, int]:
    """Return how far each weight is below the output.

    Weights after the layers have depth 0, then come the layers from the last to the first, then the
    embeddings.
    """
    matches = {name: _LAYER.match(name) for name in names}

    # By the prefix of a stack of layers: encoder and decoder have one stack each.
    last_layers: dict[str, int] = {}
    for match in matches.values():
        if match:
            last_layers[match[1]] = max(last_layers.get(match[1], 0), int(match[2]))

    # One more than that of the first layer of the longest stack, which is its last index + 1.
    embedding_depth = max(last_layers.values(), default=0) + 2

    depths = {}
    for name, match in matches.items():
        if match:
            depths[name] = last_layers[match[1]] - int(match[2]) + 1
        elif _EMBEDDING.search(name):
            depths[name] = embedding_depth
        else:
            depths[name] = 0
    return depths


def build_optimizer(
    groups: list[dict[str, Any]], section: OptimizerSection
) -> torch.optim.Optimizer:
    """Return the optimizer of `section` over `groups`; each step sets the learning rate."""
    if section.name == "adamw":
        # One kernel for all weights instead of several per weight.
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
    """Create the state that torch would create in the first step, so that it can be loaded before.

    Args:
        optimizer: its state is created.
        name: name of the optimizer in the config.
        momentum: momentum in the config.
        tensors: what the optimizer updates.
    """
    # Which state Adafactor keeps depends on a weight's shape; torch's own code decides.
    if name == "adafactor":
        _do_step_of_size_zero(optimizer)
        return

    for tensor in tensors:
        state = optimizer.state[tensor]
        if name == "adamw" and "exp_avg" not in state:
            # The fused kernel requires the step as a float32 tensor on the weight's device.
            state["step"] = torch.zeros((), dtype=torch.float32, device=tensor.device)
            state["exp_avg"] = torch.zeros_like(tensor)
            state["exp_avg_sq"] = torch.zeros_like(tensor)
        elif name == "sgd" and momentum and state.get("momentum_buffer") is None:
            state["momentum_buffer"] = torch.zeros_like(tensor)


def _do_step_of_size_zero(optimizer: torch.optim.Optimizer) -> None:
    """Let the optimizer create its own state; parameters and the first real step are unaffected."""
    weight_decays = [group["weight_decay"] for group in optimizer.param_groups]

    # The learning rate need not be restored: `set_learning_rate` sets it before each step.
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        group["weight_decay"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()

    for group, weight_decay in zip(optimizer.param_groups, weight_decays, strict=True):
        group["weight_decay"] = weight_decay
    # The step above counted; the first real one must be the first for the bias correction.
    set_step(optimizer, 0)


def get_step(optimizer: torch.optim.Optimizer) -> int:
    """Return the number of updates the optimizer has counted; 0 if it has no count."""
    for state in optimizer.state.values():
        if "step" in state:
            return int(state["step"])
    return 0


def set_step(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Set the number of updates that the optimizer uses for its bias correction."""
    for state in optimizer.state.values():
        if torch.is_tensor(state.get("step")):
            state["step"].fill_(float(step))


def set_learning_rate(
    optimizer: Any, learning_rate: float, depth_scale: Callable[[int], float] | None = None
) -> None:
    """Set the learning rate of every group, multiplied by `depth_scale` of its depth."""
    for group in optimizer.param_groups:
        scale = 1.0
        if depth_scale is not None:
            scale = depth_scale(group["depth"])
        group["lr"] = learning_rate * scale
