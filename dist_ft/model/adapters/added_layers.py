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
    # By whole parts of the name: a model's own weight may be called, say, `bottleneck_size`.
    parts = name.split(".")
    return any(part in ADDED_PARTS or part.startswith(ADDED_PREFIXES) for part in parts)


def linear_layers(model: PreTrainedModel) -> list[str]:
    """Return the last part of the name of each linear layer, sorted, each once."""
    names = set()
    for name, module in model.named_modules():
        # By the name of the class: Conv1D is transformers' transposed Linear, of GPT-2.
        is_linear = type(module).__name__ in ("Linear", "Conv1D")
        if is_linear and not is_added(name):
            names.add(name.removesuffix(".base_layer").rpartition(".")[2])
    return sorted(names)
