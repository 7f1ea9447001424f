"""A head that gets more labels: rows it has stay as they are, rows of new labels are drawn by seed and label name.

Works on model folders, before anything is loaded: what comes out is a folder whose head fits, in the cache, so that
every engine and world begins with the same. Guarantees: no label the head has is lost or moves. Copies the files.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_ft.config.sections.task import TaskSection
from dist_ft.core.errors import ModelError
from dist_ft.model import heads

if TYPE_CHECKING:
    import torch


def own_labels(folder: str, task: TaskSection) -> tuple[str, ...]:
    """Return the labels of the head a model folder has for `task`, in their order; none without such a head."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    if not heads.has_head(config, task):
        return ()
    return tuple(label for _, label in sorted((config.id2label or {}).items()))


def grown_labels(own: Sequence[str], wanted: Sequence[str], named: bool) -> tuple[str, ...]:
    """Return the labels of the grown head: its own, then those of `wanted` it has not.

    Raises ModelError if `wanted` is what the config names (`named`) and lacks a label of the head, or moves one.
    """
    lost = [label for label in own if label not in wanted]
    if named and lost:
        raise ModelError(
            f"task.labels: {lost[0]} is not among them, and the head of model.path has it; a head that "
            "grows keeps all its labels (task.grow_head); add it, or leave task.labels empty"
        )
    return (*own, *(label for label in wanted if label not in own))


def grow_head(folder: str, task: TaskSection, seed: int, cache: Path) -> str:
    """Return a model folder like `folder` whose head has the labels of `task`: `folder` itself if it has them.

    Args:
        folder: local model folder.
        task: its labels begin with those of the head there is (`grown_labels`).
        seed: the run's.
        cache: local folder for what is made.
    """
    import xxhash
    from filelock import FileLock

    own = own_labels(folder, task)
    if not own or own == task.labels:
        return folder
    files = sorted(
        (item.name, item.stat().st_size, item.stat().st_mtime_ns) for item in Path(folder).iterdir()
    )
    key = json.dumps([str(Path(folder).absolute()), files, task.name, task.labels, seed])
    target = cache / f"grown-{xxhash.xxh3_128_hexdigest(key.encode())}"
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if not target.exists():
            with tempfile.TemporaryDirectory(dir=cache, prefix=".grown-") as temporary:
                made = Path(temporary) / "model"
                shutil.copytree(folder, made)
                _grow(made, task, own, seed)
                made.rename(target)
    return str(target)


def _grow(folder: Path, task: TaskSection, own: Sequence[str], seed: int) -> None:
    """Add rows to the head in `folder`, in place."""
    from safetensors import safe_open
    from safetensors.torch import save_file
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    names = _rows_by_label(config, task, own)
    heads.set_labels(config, task.model_copy(update={"new_head": True}), str(folder))
    std = float(getattr(config.get_text_config(), "initializer_range", None) or 0.02)
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found, about = set(file.keys()) & names, file.metadata()
            held = {name: file.get_tensor(name) for name in file.keys()} if found else {}  # noqa: SIM118
        names -= found
        for name in found:
            held[name] = _with_rows(name, held[name], task.labels[len(own) :], std, seed)
        if found:
            save_file(held, path, metadata=about)
    if names:
        raise ModelError(
            f"task.grow_head: {min(names)} of the model's head is not in the files of {folder.name}; the "
            "weights of a head are needed to keep it; set task.new_head=true in place of it"
        )
    config.save_pretrained(folder)


def _rows_by_label(config: Any, task: TaskSection, own: Sequence[str]) -> set[str]:
    """Return the names of the weights that have one row a label: those that a model with one label more has larger."""
    import copy

    import torch

    shapes = []
    for more in (0, 1):
        other = copy.deepcopy(config)
        labels = (*own, *(f" {number}" for number in range(more)))
        heads.set_labels(other, task.model_copy(update={"labels": labels, "new_head": True}), "")
        with torch.device("meta"):
            model = heads.auto_class(task).from_config(other)
        shapes.append({name: tuple(value.shape) for name, value in model.named_parameters()})
    changed = {name for name, shape in shapes[0].items() if shapes[1][name] != shape}
    odd = [
        name
        for name in changed
        if shapes[1][name] != (shapes[0][name][0] + 1, *shapes[0][name][1:])
    ]
    if odd or not changed:
        raise ModelError(
            f"task.grow_head: the head of a {config.model_type} model does not have a row for each label"
            f"{f' ({odd[0]})' if odd else ''}; heads that do can grow; use task.new_head=true"
        )
    return changed


def _with_rows(
    name: str, rows: torch.Tensor, labels: Sequence[str], std: float, seed: int
) -> torch.Tensor:
    """Return the rows (L, ...) of a weight with one more for each of `labels`, in the same number format."""
    import torch

    drawn = [
        heads.initial_values(
            f"{name} {label}" if rows.dim() > 1 else name, (1, *rows.shape[1:]), std, seed
        )
        for label in labels
    ]
    return torch.cat([rows, *(row.to(rows.dtype) for row in drawn)]).contiguous()
