"""Exports a checkpoint of a run as a Hugging Face model folder.

The folder appears under its name only after it was loaded again with plain transformers and its
logits equal those of the checkpoint's weights. One process is enough; DeepSpeed, Ray and the
original model are not needed. The whole model must fit into memory twice while the two are
compared.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

from dist_ft.checkpoint import discovery
from dist_ft.checkpoint.manifest import Manifest
from dist_ft.checkpoint.stored_files import require_stored_files
from dist_ft.checkpoint.trained_model import (
    find_best,
    find_manifest,
    load_checkpoint_model,
    load_task,
    load_task_settings,
    load_trained_model,
    load_tuning,
)
from dist_ft.config.load import load_stored_section, read_stored_config
from dist_ft.config.sections.task import TaskSection
from dist_ft.config.sections.tuning import ADAPTER_METHODS
from dist_ft.core import scratch
from dist_ft.core.errors import CheckpointError
from dist_ft.core.world import World
from dist_ft.model import heads
from dist_ft.model.adapters import adapter_files
from dist_ft.model.loading.load import extra_model_kwargs, model_from_config, probe_outputs
from dist_ft.pretrained import export_info, pretrained_model
from dist_ft.pretrained.export_info import INFO_FILE
from dist_ft.pretrained.pretrained_model import Source
from dist_ft.storage.filesystem import Store

MAX_ROUNDING_ERRORS = 16
"""Largest difference of the logits of equal weights, in rounding errors of the largest logit."""


@dataclass(frozen=True)
class ExportOptions:
    """What to export.

    Attributes:
        step: step of the checkpoint. Default: the latest undamaged checkpoint.
        best: export the best checkpoint by checkpoint.best_by instead.
        dtype: "float32" or "bfloat16". Default: as in the model's config.
        adapter: export only the adapter, in the format of `peft`.
        average: export the moving average of the weights (tuning.ema_decay). Default: if the
            average was evaluated.
    """

    step: int | None = None
    best: bool = False
    dtype: str | None = None
    adapter: bool = False
    average: bool | None = None


class ModelInfo(TypedDict):
    """How to use the model as it was trained: the content of INFO_FILE."""

    task: dict[str, Any]
    prompting: dict[str, Any]
    attention: str
    prompt_template: str
    sequence_length: int | None


class _BaseModel(NamedTuple):
    """The model that an adapter belongs to."""

    path: str
    revision: str | None


def _do_nothing(folder: Path, manifest: Manifest) -> None:
    """The default of `export_run`'s `finish`."""


def export_run(
    run_url: str,
    out: str,
    options: ExportOptions | None = None,
    finish: Callable[[Path, Manifest], None] = _do_nothing,
) -> str:
    """Write the model of a run's checkpoint to a local folder and return the folder's path.

    Adapters are merged into the weights in float32.

    Args:
        run_url: fsspec URL of the run's folder.
        out: a folder that does not exist yet or is empty.
        options: what to export.
        finish: called with the complete folder and the checkpoint before the folder appears.

    Raises:
        CheckpointError: nothing was written.
    """
    options = options or ExportOptions()
    target = Path(out).expanduser().absolute()
    _require_free(target, out)

    store = Store(run_url)
    if options.best:
        manifest = find_best(store)
        discovery.verify_checksums(store, manifest, World())
    else:
        manifest = find_manifest(store, options.step)
    require_stored_files(store)

    # Next to the target, so that the move at the end is a rename: no reader sees half a folder.
    target.parent.mkdir(parents=True, exist_ok=True)
    with scratch.folder_next_to(target, "export") as temporary:
        folder = temporary / "model"
        if options.adapter:
            _save_adapter(store, manifest, folder, options.average)
        else:
            _save_model(store, manifest, folder, options)
        finish(folder, manifest)

        # An empty folder; shutil.move would put the new one into it.
        if target.exists():
            target.rmdir()
        shutil.move(str(folder), target)
    return str(target)


def _require_free(target: Path, out: str) -> None:
    """Raise CheckpointError unless `target` (from --out) does not exist or is an empty folder."""
    if not target.exists():
        return
    if not target.is_dir():
        problem = "it is a file"
    elif any(target.iterdir()):
        problem = "the folder is not empty"
    else:
        return
    raise CheckpointError(
        f"--out={out}: {problem}. Allowed: a new or an empty folder. Choose another one."
    )


def _save_model(store: Store, manifest: Manifest, folder: Path, options: ExportOptions) -> None:
    """Write the model of a checkpoint, and require that it can be loaded with equal logits."""
    model, tokenizer = load_trained_model(store, manifest, options.dtype, options.average)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / INFO_FILE).write_text(json.dumps(_model_info(store), indent=1), "utf-8")
    _check_round_trip(model, load_task(store), folder)


def _save_adapter(store: Store, manifest: Manifest, folder: Path, average: bool | None) -> None:
    """Write the adapter of a checkpoint, and require that it is read back unchanged."""
    import torch

    section = load_tuning(store)
    task = load_task(store)
    if section.method not in ADAPTER_METHODS:
        raise CheckpointError(
            f"--adapter: the run was trained with tuning.method={section.method}. --adapter is "
            "allowed for runs that train an adapter. Export it without --adapter."
        )

    model, peft_model, tokenizer, _ = load_checkpoint_model(store, manifest, "float32", average)
    base = _base_model(store)
    adapter_files.save_adapter(model, peft_model, section, base, folder)
    tokenizer.save_pretrained(folder)
    info = {
        **_model_info(store),
        "tuning": section.model_dump(mode="json"),
        "base": {"path": base.path, "revision": base.revision},
    }
    (folder / INFO_FILE).write_text(json.dumps(info, indent=1), "utf-8")

    empty_model = model_from_config(model.config, task, torch.float32).eval()
    adapter_files.check_round_trip(model, empty_model, section, task, folder)


def _model_info(store: Store) -> ModelInfo:
    stored = read_stored_config(store)
    task, prompting = load_task_settings(store)
    return {
        "task": task.model_dump(mode="json"),
        "prompting": prompting.model_dump(mode="json"),
        "attention": (stored.get("model") or {}).get("attention", "sdpa"),
        "prompt_template": (stored.get("data") or {}).get("prompt_template", "{prompt}\n"),
        "sequence_length": (stored.get("batch") or {}).get("sequence_length"),
    }


def _base_model(store: Store) -> _BaseModel:
    section = read_stored_config(store)["model"]
    return _BaseModel(str(section["path"]), section.get("revision"))


def read_exported_task(folder: Path) -> TaskSection:
    """Return the task of the model in an exported folder."""
    info = dict(export_info.read_export_info(folder, str(folder)))
    return load_stored_section(info, "task", TaskSection, str(folder / INFO_FILE))


def _check_round_trip(model: Any, task: TaskSection, folder: Path) -> None:
    """Raise CheckpointError unless the written folder, loaded again, equals `model`.

    Weights must be equal to the bit. Logits may differ by rounding, because the address of weights
    in memory can change the order of a sum.
    """
    import torch

    with torch.no_grad():
        expected = probe_outputs(model)

        # By transformers alone, as a user of the folder loads it.
        loaded, info = pretrained_model.read_model(
            Source(str(folder), str(folder)),
            heads.auto_class(task),
            dtype=model.dtype,
            output_loading_info=True,
            **extra_model_kwargs(model.config, task),
        )

        # Copy the weights from the memory-mapped file: its alignment changes the last bits.
        for tensor in (*loaded.parameters(), *loaded.buffers()):
            tensor.data = tensor.data.clone()
        actual = probe_outputs(loaded.eval())

    weights = model.state_dict()
    loaded_weights = loaded.state_dict()
    weights_are_equal = weights.keys() == loaded_weights.keys() and all(
        torch.equal(weights[name], loaded_weights[name]) for name in weights
    )

    # Relative to the largest logit: rounding errors of a sum scale with its terms, and a logit near
    # 0 may be the difference of large ones.
    tolerance = MAX_ROUNDING_ERRORS * torch.finfo(model.dtype).eps * expected.abs().max()
    logits_are_close = torch.allclose(expected, actual, rtol=0, atol=float(tolerance))

    # transformers initializes missing weights at random without an error.
    if info["missing_keys"] or not weights_are_equal or not logits_are_close:
        difference = (expected - actual).abs().max().item()
        raise CheckpointError(
            f"{folder}: the exported model does not give the same logits when loaded again "
            f"(largest difference {difference:g}, missing {sorted(info['missing_keys'])[:3]}). "
            "Nothing was exported. Report this model as a bug."
        )
