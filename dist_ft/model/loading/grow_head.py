"""Add labels to a head: existing rows stay, rows of new labels are drawn by seed and label name.

Works on model folders, before anything is loaded: the result is a folder in the cache whose head
fits, so that every engine and world starts with the same weights. Guarantees: no label of the head
is lost or moved. Copies the files.

Dimensions: L rows of a weight, one for each label.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_ft.config.sections.task import TaskSection
from dist_ft.core import scratch
from dist_ft.core.errors import ModelError
from dist_ft.model import heads
from dist_ft.pretrained import pretrained_model, weight_files
from dist_ft.pretrained.pretrained_model import Source
from dist_ft.storage import local_files

if TYPE_CHECKING:
    import torch


def _source(folder: str) -> Source:
    return Source(folder, f"model.path={folder}")


def own_labels(folder: str, task: TaskSection) -> tuple[str, ...]:
    """Return the labels of a model folder's head for `task`, in order; empty without one."""
    config = pretrained_model.read_config(_source(folder))
    if not heads.has_head(config, task):
        return ()

    # By number, because config.json may list labels in any order.
    id2label = config.id2label or {}
    return tuple(id2label[number] for number in sorted(id2label))


def grown_labels(own: Sequence[str], labels: Sequence[str], named: bool) -> tuple[str, ...]:
    """Return the labels of the grown head: its own, then the new ones among `labels`.

    Args:
        own: labels of the head.
        labels: labels of the run.
        named: `labels` are those that the config names, not those found in the data.

    Raises:
        ModelError: `labels` are named, and lack one of the head's.
    """
    # Labels found in the data may lack some of the head's: data of new classes only is fine.
    lost = [label for label in own if label not in labels]
    if named and lost:
        raise ModelError(
            f"task.labels: {lost[0]} is missing, but the head of model.path has it. A head that "
            "grows keeps all its labels (task.grow_head). Add the label, or leave task.labels "
            "empty."
        )

    new = [label for label in labels if label not in own]
    return (*own, *new)


def grow_head(folder: str, task: TaskSection, seed: int, cache: Path) -> str:
    """Return a model folder like `folder` whose head has the labels of `task`.

    `folder` itself if its head has them.

    Args:
        folder: local model folder.
        task: its labels start with those of the existing head (`grown_labels`).
        seed: the run's.
        cache: local folder for the result.

    Raises:
        ModelError: the head has no row for each label, or its weights are not in the files.
    """
    import xxhash

    own = own_labels(folder, task)
    if not own or own == task.labels:
        return folder

    files = []
    for item in Path(folder).iterdir():
        stat = item.stat()
        files.append((item.name, stat.st_size, stat.st_mtime_ns))
    files.sort()

    # The name of the result follows from everything it depends on.
    key = json.dumps([str(Path(folder).absolute()), files, task.name, task.labels, seed])
    target = cache / f"grown-{xxhash.xxh3_128_hexdigest(key.encode())}"

    # All workers of a node need the folder at the same time; one of them writes it.
    with local_files.locked(f"{target}.lock"):
        if not target.exists():
            # Renamed when complete, so that a crash leaves no partial folder.
            with scratch.folder_next_to(target, "grown") as temporary:
                copy = temporary / "model"
                copy.mkdir()
                for name in pretrained_model.file_names(_source(folder)):
                    (copy / name).parent.mkdir(exist_ok=True)
                    shutil.copy2(Path(folder) / name, copy / name)
                _grow_in_place(copy, task, own, seed)
                copy.rename(target)
    return str(target)


def _grow_in_place(folder: Path, task: TaskSection, own: Sequence[str], seed: int) -> None:
    """Add rows to the head in `folder`."""
    from safetensors.torch import save_file

    config = pretrained_model.read_config(_source(str(folder)))
    missing = _weights_with_row_per_label(config, task, own)
    heads.set_labels(config, task.model_copy(update={"new_head": True}), str(folder))
    std = heads.init_std(config)
    new_labels = task.labels[len(own) :]

    # Only the files that hold a weight of the head are written again.
    for path in weight_files.weight_files(folder, str(folder)):
        with weight_files.open_weights(path, str(folder)) as file:
            names = set(file.keys()) & missing
            metadata = file.metadata()  # the format "pt", which some readers require
            if not names:
                continue
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

        missing -= names
        for name in names:
            tensors[name] = _with_new_rows(name, tensors[name], new_labels, std, seed)
        save_file(tensors, path, metadata=metadata)

    if missing:
        raise ModelError(
            f"task.grow_head: {min(missing)} of the model's head is not in the files of "
            f"{folder.name}. The weights of a head are needed to keep it. Set task.new_head=true "
            "instead."
        )
    config.save_pretrained(folder)


def _weights_with_row_per_label(config: Any, task: TaskSection, own: Sequence[str]) -> set[str]:
    """Return the names of the weights with a row for each label.

    They are the ones that are larger in a model with one more label.
    """
    shapes = _weight_shapes(config, task, own)
    larger_shapes = _weight_shapes(config, task, (*own, " 0"))

    changed = {name for name, shape in shapes.items() if larger_shapes[name] != shape}
    odd = []
    for name in changed:
        num_rows, *others = shapes[name]
        if larger_shapes[name] != (num_rows + 1, *others):
            odd.append(name)

    # Where another dimension than the first grows, a new row would not do.
    if odd or not changed:
        which = ""
        if odd:
            which = f" ({odd[0]})"
        raise ModelError(
            f"task.grow_head: the head of a {config.model_type} model does not have a row for each "
            f"label{which}. Only heads that do can grow. Use task.new_head=true."
        )
    return changed


def _weight_shapes(
    config: Any, task: TaskSection, labels: Sequence[str]
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the weights of a model with a new head for `labels`."""
    import copy

    import torch

    labeled_config = copy.deepcopy(config)
    labeled_task = task.model_copy(update={"labels": tuple(labels), "new_head": True})
    heads.set_labels(labeled_config, labeled_task, "")

    # On the meta device, a model has shapes and takes no memory.
    with torch.device("meta"):
        model = pretrained_model.model_from_config(labeled_config, heads.auto_class(task))
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _with_new_rows(
    name: str, rows: torch.Tensor, labels: Sequence[str], std: float, seed: int
) -> torch.Tensor:
    """Return the rows (L, ...) of a weight with one more for each of `labels`, same dtype."""
    import torch

    new_rows = []
    for label in labels:
        # Seeded by label, so that a row does not depend on which other labels are new. Values of a
        # bias are constant, but follow from the end of the name.
        key = name
        if rows.dim() > 1:
            key = f"{name} {label}"
        row = heads.initial_values(key, (1, *rows.shape[1:]), std, seed)
        new_rows.append(row.to(rows.dtype))
    return torch.cat([rows, *new_rows]).contiguous()
