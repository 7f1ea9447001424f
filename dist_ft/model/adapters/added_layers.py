"""Which weights and layers of a model were added by a tuning method, and which are linear."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# In this order: AdaLoRA (its other weights start with lora_), soft prompts, bottleneck adapters. A
# new method must be listed here or below, or its weights count as the model's own.
ADDED_PARTS = ("ranknum", "virtual_tokens", "bottleneck")
ADDED_PREFIXES = ("lora_", "ia3_")
"""A weight is an added one if a part of its dotted name is in `ADDED_PARTS` or starts so."""


def is_added(name: str) -> bool:
    """Whether the weight or layer `name` was added and is not in the model's own files."""
    # Whole parts are compared: the model itself may have a weight called, say, `bottleneck_size`.
    parts = name.split(".")
    return any(part in ADDED_PARTS or part.startswith(ADDED_PREFIXES) for part in parts)


def linear_layers(model: PreTrainedModel) -> list[str]:
    """Return the distinct names of the model's own linear layers, sorted.

    Of each name only the last part, such as q_proj, which tuning.<method>.targets may list.
    """
    names = set()
    for name, module in model.named_modules():
        # By class name, which needs no import. Conv1D is transformers' transposed Linear, of GPT-2.
        is_linear = type(module).__name__ in ("Linear", "Conv1D")
        if is_linear and not is_added(name):
            # peft moves a layer that gets an adapter to `<name>.base_layer`.
            names.add(name.removesuffix(".base_layer").rpartition(".")[2])
    return sorted(names)
