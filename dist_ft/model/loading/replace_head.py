"""Heads in a model's files that a new one replaces: hidden from transformers, on every rank alike.

transformers passes over a tensor of another shape by itself, but not under ZeRO-3: there rank 0 alone raises, and the
others wait for it. Reads names and shapes only.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_ft.config.schema import ModelSection, TaskSection
from dist_ft.model import heads

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def replaced_head_key_mapping(
    section: ModelSection, folder: str, config: PretrainedConfig, task: TaskSection
) -> dict[str, str] | None:
    """Return other names for tensors of the files in `folder` that a new head replaces, so that nothing loads them."""
    from transformers import AutoConfig

    if task.name not in heads.TASKS_WITH_HEAD or type(config) not in heads.auto_class(task)._model_mapping:
        return None
    kind: Any = heads.auto_class(task)._model_mapping[type(config)]
    prefix = f"{(kind[0] if isinstance(kind, tuple | list) else kind).base_model_prefix}."
    shapes = tensor_shapes(folder)
    if not any(name.startswith(prefix) for name in shapes):
        return None  # of a bare model: no head
    stored = AutoConfig.from_pretrained(
        folder, trust_remote_code=section.trust_remote_code
    ).num_labels
    other = {
        name
        for name, shape in shapes.items()
        if not name.startswith(prefix)
        and (task.new_head or (stored != config.num_labels and shape[:1] == [stored]))
    }
    return {f"^{re.escape(name)}$": f"replaced.{name}" for name in other} or None


def tensor_shapes(folder: str) -> dict[str, list[int]]:
    """Return the shape of each tensor in the safetensors of a model's folder."""
    from safetensors import safe_open

    found = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            found.update({name: list(opened.get_slice(name).get_shape()) for name in opened.keys()})  # noqa: SIM118
    return found
