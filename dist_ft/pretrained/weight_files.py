"""Weights in the safetensors of a model folder: which files, which tensors, read with clear errors.

Guarantee: a file is read only if it lies in the folder.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_ft.core import native_errors
from dist_ft.core.errors import DistFtError, ModelError
from dist_ft.pretrained import folder_files

if TYPE_CHECKING:
    import torch

INDEX_SUFFIX = ".index.json"
WEIGHTS_INDEX = "model.safetensors.index.json"
WEIGHTS_SUFFIX = ".safetensors"
MAX_HEADER_BYTES = 100_000_000
"""Limit of the safetensors library, too."""


@contextlib.contextmanager
def open_weights(path: Path, shown: str) -> Iterator[Any]:
    """Open a safetensors file for torch; `shown` names its model in errors.

    Raises:
        ModelError: it cannot be read, or is no valid safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with native_errors.panics_as_errors(), safe_open(str(path), framework="pt") as file:
            yield file
    except DistFtError:
        raise
    except (OSError, SafetensorError, native_errors.NativeError) as error:
        raise ModelError(
            f"{shown}: cannot load the weights ({path.name}: {native_errors.first_line(error)}). A "
            "complete safetensors file is needed. Download the model again."
        ) from error


def load_weights(folder: str | Path, name: str) -> dict[str, torch.Tensor]:
    """Return all tensors of a file in `folder`, by name.

    Raises:
        ModelError: the file is not in the folder, or cannot be read.
    """
    shown = f"model.path={folder}"
    path = folder_files.resolve_in_folder(Path(folder), name, shown)
    with open_weights(path, shown) as file:
        return {tensor: file.get_tensor(tensor) for tensor in file.keys()}  # noqa: SIM118


def weight_files(folder: str | Path, shown: str) -> list[Path]:
    """Return the weight files of a folder, checked.

    Raises:
        ModelError: one leads out of the folder, or an index names a file that is not in it.
    """
    root = Path(folder)
    for index in sorted(root.glob(f"*{WEIGHTS_SUFFIX}{INDEX_SUFFIX}")):
        files_in_index(root, index.name, shown)

    files = []
    for path in sorted(root.glob(f"*{WEIGHTS_SUFFIX}")):
        checked = folder_files.resolve_in_folder(root, path.name, shown)
        _check_header_length(checked, shown)
        files.append(checked)
    return files


def _check_header_length(path: Path, shown: str) -> None:
    """Raise ModelError unless the file can hold the header that its first bytes announce."""
    with open(path, "rb") as file:
        announced = int.from_bytes(file.read(8), "little")
    largest = min(MAX_HEADER_BYTES, path.stat().st_size - 8)
    if not 0 < announced <= largest:
        raise ModelError(
            f"{shown}: {path.name} is no safetensors file: its header would have {announced:,} "
            f"bytes. At most {max(0, largest):,} fit. Download the model again."
        )


def files_in_index(folder: Path, index: str, shown: str) -> dict[str, Path]:
    """Return the file of each tensor that an index lists.

    Raises:
        ModelError: the index is damaged, or names a file outside of the folder.
    """
    content = folder_files.read_json(folder, index, shown, folder_files.MAX_INDEX_BYTES)
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not isinstance(content.get("metadata", {}), dict | None):
        raise ModelError(
            f"{shown}: {index} has no weight_map. It must give the file of each tensor. Download "
            "the model again."
        )

    # Each name is checked once: a model has thousands of tensors in a few files.
    paths: dict[str, Path] = {}
    by_tensor = {}
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or name not in paths:
            path = folder_files.resolve_in_folder(folder, name, f"{shown}: {index}")
            _require_safetensors(path, f"{shown}: {index}")
            paths[name] = path
        by_tensor[tensor] = paths[name]
    return by_tensor


def _require_safetensors(path: Path, shown: str) -> None:
    if path.suffix != WEIGHTS_SUFFIX:
        raise ModelError(
            f"{shown}: names {path.name}. Only *{WEIGHTS_SUFFIX} are read. Convert the model."
        )


def files_by_tensor(folder: str | Path, shown: str) -> dict[str, Path]:
    """Return the file of a model folder that contains each tensor.

    Raises:
        ModelError: a file is damaged or leads out of the folder.
    """
    root = Path(folder)
    if (root / WEIGHTS_INDEX).exists():
        return files_in_index(root, WEIGHTS_INDEX, shown)

    files: dict[str, Path] = {}
    for path in weight_files(root, shown):
        with open_weights(path, shown) as file:
            files.update(dict.fromkeys(file.keys(), path))
    return files


def tensor_shapes(folder: str | Path, shown: str) -> dict[str, list[int]]:
    """Return the shape of each tensor in the weight files of a folder; no weights are read."""
    shapes = {}
    for path in weight_files(folder, shown):
        with open_weights(path, shown) as file:
            for name in file.keys():  # noqa: SIM118
                shapes[name] = list(file.get_slice(name).get_shape())
    return shapes


def num_elements(folder: str | Path, shown: str) -> int:
    """Return the number of elements in all weight files of a folder."""
    return sum(math.prod(shape) for shape in tensor_shapes(folder, shown).values())
