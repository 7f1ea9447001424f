"""Bottleneck adapters (Houlsby et al., arXiv:1902.00751): a small network behind each sub-layer of a frozen model.

Down-projection, non-linearity, up-projection, and what came in added to it; the up-projection begins as zero, so the
model begins as it was. A network is a child of the linear layer it stands behind, so the model's own names stay. It can
not be merged into weights. The library of the field, `adapters` 1.3, wants transformers 4.57, hence these lines.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dist_ft.config.sections.tuning import BottleneckSection
from dist_ft.core.errors import ModelError
from dist_ft.model.adapters.added_layers import (
    linear_layers,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "bottleneck"
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
"""What models call the last linear layer of an attention or feed-forward block."""
INIT_STD = 0.02


class Bottleneck(nn.Module):
    """x + up(f(down(x))), of the same shape (..., H) as x."""

    def __init__(self, width: int, section: BottleneckSection, dtype: torch.dtype) -> None:
        super().__init__()
        self.down = nn.Linear(width, section.size, dtype=dtype)
        self.up = nn.Linear(section.size, width, dtype=dtype)
        self.activation = {"gelu": nn.GELU, "relu": nn.ReLU, "silu": nn.SiLU, "tanh": nn.Tanh}[
            section.activation
        ]()
        self.dropout = nn.Dropout(section.dropout)
        nn.init.normal_(self.down.weight, std=INIT_STD)
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return what comes out for `x` (..., H)."""
        return x + self.up(self.dropout(self.activation(self.down(x))))


def add_bottlenecks(model: PreTrainedModel, section: BottleneckSection, seed: int) -> None:
    """Put a network behind each layer of `model` that `section` names, drawn by `seed`.

    Raises ModelError if there is no such layer.
    """
    layers = {name: module for name, module in model.named_modules() if _is_linear(module)}
    wanted = OUTPUT_LAYERS if section.targets == ("auto",) else section.targets
    found = {end: [name for name in layers if f".{name}".endswith(f".{end}")] for end in wanted}
    absent = (
        []
        if section.targets == ("auto",) and any(found.values())
        else [end for end in wanted if not found[end]]
    )
    if absent:
        raise ModelError(
            f"tuning.bottleneck.targets={list(section.targets)}: no linear layer is called "
            f"{'by a name it knows' if absent == list(OUTPUT_LAYERS) else absent[0]}; there are "
            f"{', '.join(linear_layers(model))}; name some of them"
        )
    chosen = {name for names in found.values() for name in names}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        for name, layer in layers.items():
            if name in chosen:
                layer.add_module(NAME, Bottleneck(_width(layer), section, model.dtype))
                layer.register_forward_hook(_behind)


def _behind(layer: nn.Module, _args: Any, output: torch.Tensor) -> torch.Tensor:
    return layer.get_submodule(NAME)(output)  # type: ignore[no-any-return]


def _is_linear(module: nn.Module) -> bool:
    return type(module).__name__ in ("Linear", "Conv1D")


def _width(layer: Any) -> int:
    """Return the width of what a layer puts out."""
    return int(layer.nf if hasattr(layer, "nf") else layer.out_features)
