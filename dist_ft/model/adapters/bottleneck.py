"""Bottleneck adapters: a small network behind each sub-layer of a frozen model.

Method: Houlsby et al., arXiv:1902.00751.

Down-projection, non-linearity, up-projection, added to the input. The up-projection starts as zero,
so the model starts unchanged. A network is a child of the linear layer it follows, so the model's
own parameter names stay. It cannot be merged into weights. The library of the field, `adapters`
1.3, requires transformers 4.57; hence this implementation.

Dimensions: H width of a layer's output.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dist_ft.config.sections.tuning import BottleneckSection
from dist_ft.core.errors import ModelError
from dist_ft.model.adapters.added_layers import linear_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "bottleneck"
"""Name of an adapter in the layer it follows."""
OUTPUT_LAYERS = (
    "o_proj",
    "out_proj",
    "attn.c_proj",
    "attention.output.dense",
    "attention.dense",
    "out_lin",
    "SelfAttention.o",
    "EncDecAttention.o",
    "down_proj",
    "mlp.c_proj",
    "output.dense",
    "fc2",
    "dense_4h_to_h",
    "fc_out",
    "lin2",
    "wo",
)
"""Names, in various models, of the last linear layer of an attention or feed-forward block."""
INIT_STD = 0.02
ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU, "silu": nn.SiLU, "tanh": nn.Tanh}


class Bottleneck(nn.Module):
    """x + up(f(down(x))), of the same shape (..., H) as x."""

    def __init__(self, width: int, section: BottleneckSection, dtype: torch.dtype) -> None:
        super().__init__()
        self.down = nn.Linear(width, section.size, dtype=dtype)
        self.up = nn.Linear(section.size, width, dtype=dtype)
        self.activation = ACTIVATIONS[section.activation]()
        self.dropout = nn.Dropout(section.dropout)

        # Only `up` is zero: if both were, neither weight would ever get a gradient.
        nn.init.normal_(self.down.weight, std=INIT_STD)
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the adapter's output (..., H) for `x` (..., H)."""
        hidden = self.activation(self.down(x))  # (..., section.size)
        return x + self.up(self.dropout(hidden))


def add_bottlenecks(model: PreTrainedModel, section: BottleneckSection, seed: int) -> None:
    """Add a network behind each layer of `model` that `section` targets, initialized by `seed`.

    Raises:
        ModelError: no such layer exists.
    """
    layers = {name: module for name, module in model.named_modules() if _is_linear(module)}
    is_auto = section.targets == ("auto",)
    targets = OUTPUT_LAYERS if is_auto else section.targets

    chosen: set[str] = set()
    unmatched = []
    for target in targets:
        # The dot in front: `o_proj` must not match `my_o_proj`.
        matches = [name for name in layers if f".{name}".endswith(f".{target}")]
        chosen.update(matches)
        if not matches:
            unmatched.append(target)

    # No model has all the known names, but each name that a user gives must exist.
    if is_auto and chosen:
        unmatched = []
    if unmatched:
        missing = f"named {unmatched[0]}"
        if is_auto:
            missing = "with a known name"
        raise ModelError(
            f"tuning.bottleneck.targets={list(section.targets)}: the model has no linear layer "
            f"{missing}. It has {', '.join(linear_layers(model))}. Name some of them."
        )

    # The caller's random state stays. Layers come in the order of the model, so that the draws do
    # not depend on the order of targets.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        for name, layer in layers.items():
            if name in chosen:
                adapter = Bottleneck(_output_width(layer), section, model.dtype)
                layer.add_module(NAME, adapter)
                layer.register_forward_hook(_run_bottleneck)


def _run_bottleneck(layer: nn.Module, _args: Any, output: torch.Tensor) -> torch.Tensor:
    return layer.get_submodule(NAME)(output)  # type: ignore[no-any-return]


def _is_linear(module: nn.Module) -> bool:
    return type(module).__name__ in ("Linear", "Conv1D")


def _output_width(layer: Any) -> int:
    if hasattr(layer, "nf"):  # Conv1D
        return int(layer.nf)
    return int(layer.out_features)
