"""Heads in a model's files that a new head replaces: hidden from transformers, on every rank alike.

transformers skips a tensor of another shape by itself, but not under ZeRO-3: there only rank 0
raises an error, and the others wait for it. Reads names and shapes only.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from dist_ft.config.schema import TaskSection
from dist_ft.model import heads
from dist_ft.model.model_task import model_task
from dist_ft.pretrained import pretrained_model, weight_files
from dist_ft.pretrained.pretrained_model import Source

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def replaced_head_key_mapping(
    source: Source, config: PretrainedConfig, task: TaskSection
) -> dict[str, str] | None:
    """Return {pattern: other name} of the tensors in a folder that a new head replaces.

    Under the other names transformers does not load them. None: nothing is replaced.
    """
    model_classes = heads.auto_class(task)._model_mapping
    if not model_task(task).has_head or type(config) not in model_classes:
        return None

    # A few models have several classes for a task; the first is the usual one.
    model_class: Any = model_classes[type(config)]
    if isinstance(model_class, tuple | list):
        model_class = model_class[0]
    prefix = f"{model_class.base_model_prefix}."

    shapes = weight_files.tensor_shapes(source.folder, source.shown)
    if not any(name.startswith(prefix) for name in shapes):
        return None  # the files of a base model have no head

    stored_config = pretrained_model.read_config(source)
    num_stored = stored_config.num_labels

    mapping = {}
    for name, shape in shapes.items():
        if name.startswith(prefix):
            continue
        # A head for another number of labels does not fit.
        has_row_per_label = num_stored != config.num_labels and shape[:1] == [num_stored]
        if task.new_head or has_row_per_label:
            mapping[f"^{re.escape(name)}$"] = f"replaced.{name}"
    return mapping or None
