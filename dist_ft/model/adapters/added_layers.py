"""The layers of a model: which are linear, and which were added by a tuning method."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADDED_PARTS = ("ranknum", "virtual_tokens", "bottleneck")
"""Parts of names of added weights, besides those that begin with lora_ or ia3_."""


def is_added(name: str) -> bool:
    """Tell whether a weight of this name is an adapter's, of which a model's own files know nothing."""
    return any(part.startswith(("lora_", "ia3_")) or part in ADDED_PARTS for part in name.split("."))


def linear_layers(model: PreTrainedModel) -> list[str]:
    """Return what linear layers are called, each name once."""
    return sorted(
        {
            name.removesuffix(".base_layer").rpartition(".")[2]
            for name, module in model.named_modules()
            if type(module).__name__ in ("Linear", "Conv1D") and not is_added(name)
        }
    )
