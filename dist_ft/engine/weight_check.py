"""Compares the engine's weights with the model files before step 1, under every ZeRO stage.

transformers can leave a weight randomly initialized without a warning, and a wrong fragment address
would corrupt every checkpoint. Both show as a difference between a state slice and the same
elements in the safetensors files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from dist_ft.core.errors import ModelError
from dist_ft.engine.base import StateSlice
from dist_ft.pretrained import weight_files

MAX_COMPARED = 256
"""Elements compared per slice: enough to distinguish weights from noise, and fast for any model."""


def verify_weights(
    state: Iterable[StateSlice],
    folder: str,
    dtype: torch.dtype,
    name_in_files: Callable[[str], str] = lambda name: name,
    prefix: str = "",
) -> int:
    """Compare this worker's weights with the files in `folder`; return the number of slices.

    Parameters that transformers renames or fuses when it loads a model have no tensor of their
    name; transformers itself reports missing keys of those.

    Args:
        state: the engine's state slices.
        folder: the model folder.
        dtype: the type the weights were loaded in.
        name_in_files: maps a parameter's name to that of the tensor.
        prefix: prefix of the base model's tensors; files of a model without a head lack it.

    Raises:
        ModelError: a weight differs.
    """
    files = weight_files.files_by_tensor(folder, f"model.path={folder}")
    num_compared = 0
    for part in state:
        if part.key not in ("param", "frozen") or part.numel == 0:
            continue

        name = _find_tensor(files, name_in_files(part.name), prefix)
        if not name:
            continue

        with weight_files.open_weights(files[name], folder) as file:
            num_elements = min(MAX_COMPARED, part.numel)
            expected = _read_elements(file.get_slice(name), part.offset, num_elements)

        # Exactly equal: a cast rounds the same way everywhere. Some weights stay in float32
        # whatever the type of the model.
        actual = part.read()[: len(expected)].float().cpu()
        is_equal_after_cast = torch.equal(actual, expected.to(dtype).float())
        if not is_equal_after_cast and not torch.equal(actual, expected.float()):
            raise ModelError(
                f"{name}: the weights in memory (elements from {part.offset}) differ from those in "
                f"{files[name]}. They were initialized again or misplaced while loading. The run "
                "stops before step 1. Report this model as a bug."
            )
        num_compared += 1
    return num_compared


def _find_tensor(files: dict[str, Path], name: str, prefix: str) -> str:
    """Return `name` as it is in the files, with or without `prefix`; "" if it is not."""
    if not name:
        return ""
    for candidate in (name, name.removeprefix(prefix), prefix + name):
        if candidate in files:
            return candidate
    return ""


def _read_elements(tensor: Any, offset: int, count: int) -> torch.Tensor:
    """Return `count` flat elements from `offset` of a tensor in a file; reads only their rows."""
    shape = tensor.get_shape()
    if not shape:
        return tensor[...].reshape(-1)

    # A file's tensor is sliced along its dimensions, not by flat elements. Only the rows that hold
    # them are read: an embedding can have gigabytes.
    row_size = math.prod(shape[1:])
    first_row = offset // row_size
    last_row = (offset + count - 1) // row_size

    elements = tensor[first_row : last_row + 1].reshape(-1)
    return elements[offset - first_row * row_size :][:count]
