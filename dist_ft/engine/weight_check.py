"""Is what the engine holds what the files say? Asked before step 1, of every parameter, under every ZeRO stage.

transformers can leave a weight re-initialised without saying so, and a wrong fragment address would corrupt every
checkpoint; both show as a difference between a slot and the same elements in the safetensors files.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from dist_ft.core.errors import ModelError
from dist_ft.engine.base import StateSlice

ELEMENTS = 256
"""Compared at the start of each slot: enough to tell weights from noise, cheap at any model size."""


def files_by_tensor(folder: str) -> dict[str, Path]:
    """Return which safetensors file of a model folder holds which tensor."""
    from safetensors import safe_open

    index = Path(folder) / "model.safetensors.index.json"
    if index.exists():
        names = json.loads(index.read_text("utf-8"))["weight_map"]
        return {name: Path(folder) / file for name, file in names.items()}
    found = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            found.update(dict.fromkeys(opened.keys(), file))
    return found


def verify_weights(
    slots: Iterable[StateSlice],
    folder: str,
    dtype: torch.dtype,
    name_in_files: Callable[[str], str] = lambda name: name,
    prefix: str = "",
) -> int:
    """Compare this worker's weights with the files in `folder`; return how many parameters were compared.

    `name_in_files` maps a slot's name to the tensor's; files of a model without its head leave out the `prefix` of its
    body, and files of one with a head have it. Parameters that transformers renames or fuses on loading have
    no tensor of their name and are left to its own report of missing keys. Raises ModelError for the first that
    differs.
    """
    from safetensors import safe_open

    files = files_by_tensor(folder)
    compared = 0
    for slot in slots:
        mapped = name_in_files(slot.name)
        name = next(
            (one for one in (mapped, mapped.removeprefix(prefix), prefix + mapped) if one in files),
            "",
        )
        if slot.key not in ("param", "frozen") or not name or not mapped or slot.numel == 0:
            continue
        with safe_open(files[name], framework="pt") as opened:
            want = _elements(opened.get_slice(name), slot.offset, min(ELEMENTS, slot.numel))
        got = slot.read()[: len(want)].float().cpu()
        if not (
            torch.equal(got, want.to(dtype).float()) or torch.equal(got, want.float())
        ):  # some stay in float32
            raise ModelError(
                f"{name}: the weights in memory (elements from {slot.offset}) are not those of "
                f"{files[name]}; they were re-initialised or misplaced while loading; the run stops before step 1"
            )
        compared += 1
    return compared


def _elements(tensor: Any, offset: int, count: int) -> torch.Tensor:
    """Return `count` flat elements from `offset` of a tensor in a file, reading just the rows they are in."""
    shape = tensor.get_shape()
    if not shape:
        return tensor[...].reshape(-1)
    width = math.prod(shape[1:])
    first, last = offset // width, (offset + count - 1) // width
    return tensor[first : last + 1].reshape(-1)[offset - first * width :][:count]
