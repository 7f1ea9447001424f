"""The layers of a model: which are linear, and which were added by a tuning method."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADDED_PARTS = ("ranknum", "virtual_tokens", "bottleneck")
ADDED_PREFIXES = ("lora_", "ia3_")
"""Added weights have a name part that is one of `ADDED_PARTS` or starts with one of these."""


def is_added(name: str) -> bool:
    """Whether a weight of this name belongs to an adapter and is not in the model's own files."""
    return any(part in ADDED_PARTS or part.startswith(ADDED_PREFIXES) for part in name.split("."))


def linear_layers(model: PreTrainedModel) -> list[str]:
    """Return the last part of the name of each linear layer, sorted, each once."""
    names = {
        name.removesuffix(".base_layer").rpartition(".")[2]
        for name, module in model.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D") and not is_added(name)
    }
    return sorted(names)
