"""The model of a run without its weights, on the meta device.

Its structure follows from its config.json alone. Guarantees: no weights are read or downloaded,
whether the model is in a folder, a bucket or the hub. Does not run code that comes with a model
unless the config allows it.

Dimensions: B rows of a batch, T tokens of a row.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_ft.config.schema import ModelSection, RunConfig, TaskSection
from dist_ft.core import scratch
from dist_ft.core.errors import MAX_LINE, ModelError, StorageError
from dist_ft.core.logs import redact
from dist_ft.model.adapters import tuning
from dist_ft.model.loading.load import build_uninitialized_model
from dist_ft.model.trainable_model import Inputs, TrainableModel
from dist_ft.pretrained import folder_files
from dist_ft.storage import filesystem
from dist_ft.storage.documents import MAX_BYTES

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

CONFIG = "config.json"


def build_meta_model(
    config: RunConfig, task: TaskSection, file: str | None = None
) -> PreTrainedModel:
    """Return the model on the meta device, frozen and extended as the tuning method requires.

    Args:
        config: the run.
        task: the model's task, with its labels.
        file: a config.json (or its folder) to use instead of model.path.

    Raises:
        ModelError: no such config exists, or it is not valid.
    """
    import torch

    with (
        warnings.catch_warnings(),
        with_local_config(config.model, file) as section,
        torch.device("meta"),
    ):
        # torch warns about operations that have no effect on the meta device.
        warnings.simplefilter("ignore")
        model = build_uninitialized_model(section, None, task)

        # No tokenizer is loaded, and only the number of virtual tokens matters for shapes.
        text_ids: list[int] = []
        if config.tuning.prompt.text:
            text_ids = list(range(config.tuning.prompt.tokens))
        tuning.apply_tuning(model, config.tuning, config.run.seed, task, text_ids)
    return model


@contextlib.contextmanager
def with_local_config(section: ModelSection, file: str | None = None) -> Iterator[ModelSection]:
    """Yield the section with a local folder that holds config.json as its path.

    Its attention is one that needs no package. Errors name the original path.
    """
    with scratch.folder("outline") as path:
        folder = str(path)
        if file is None:
            found, shown_path = _find_config(section, folder), section.path
        else:
            found, shown_path = _config_in(file), file
        _check_json(found, shown_path)

        # A folder with config.json alone: what reads it cannot find weights to load.
        if not os.path.samefile(os.path.dirname(found) or ".", folder):
            shutil.copy(found, os.path.join(folder, CONFIG))

        # transformers refuses flash attention where its package is missing, as on most machines
        # that only plan. `memory_trace` counts the same bytes for both.
        changes: dict[str, Any] = {"path": folder, "revision": None}
        if section.attention.startswith("flash"):
            changes["attention"] = "sdpa"
        try:
            yield section.model_copy(update=changes)
        except ModelError as error:
            raise ModelError(str(error).replace(folder, shown_path)) from error


def _config_in(path: str) -> str:
    """Return the config.json that --model-config names, itself or by its folder."""
    file = path
    if os.path.isdir(path):
        file = os.path.join(path, CONFIG)
    if not os.path.isfile(file):
        raise ModelError(
            f"--model-config={path}: the file does not exist. Give a model's config.json, or a "
            "folder that holds one."
        )
    return file


def _find_config(section: ModelSection, folder: str) -> str:
    """Return a local config.json of `section.path`; a bucket's is put into `folder`."""
    path = section.path
    if not filesystem.is_local(path):
        return _from_bucket(path, folder)

    local = filesystem.local_path(path)
    if os.path.isdir(local):
        file = str(folder_files.resolve_in_folder(Path(local), CONFIG, f"model.path={path}"))
        if not os.path.isfile(file):
            raise ModelError(
                f"model.path={path}: it has no config.json. A plan needs a model's config.json (no "
                "weights). Give its folder, or --model-config FILE."
            )
        return file

    # A hub name is org/name; anything else must be a folder and is not looked up on the hub.
    if path.startswith((".", "/", "~", "file:")) or path.count("/") != 1:
        raise ModelError(
            f"model.path={path}: the folder does not exist. Give a model folder, an fsspec URL of "
            "one, a hub name such as org/name, or --model-config FILE."
        )
    return _from_hub(path, section.revision)


def _from_bucket(url: str, folder: str) -> str:
    try:
        content = filesystem.Store(url).read_at_most(CONFIG, MAX_BYTES)
    except StorageError as error:
        raise ModelError(
            redact(
                f"model.path={url}: cannot read its config.json from here ({error}). A plan needs "
                "no more than that file. Give --model-config FILE."
            )
        ) from error

    path = os.path.join(folder, CONFIG)
    with open(path, "wb") as file:
        file.write(content)
    return path


def _from_hub(name: str, revision: str | None) -> str:
    """Download config.json alone; HF_TOKEN in the environment gives access to gated models."""
    from huggingface_hub import hf_hub_download

    # Otherwise each of its attempts would log a line.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        return hf_hub_download(name, CONFIG, revision=revision)
    except Exception as error:
        raise ModelError(
            redact(
                f"model.path={name}: the folder does not exist here, and the hub does not provide "
                f"its config.json ({type(error).__name__}). Check the spelling, set HF_TOKEN for a "
                "gated model, or give --model-config FILE."
            )
        ) from error


def _check_json(file: str, shown_path: str) -> None:
    """Raise ModelError unless `file` is the config of a model."""
    # The target of a link: the user named it, or it is one of the hub's cache.
    path = Path(os.path.realpath(file))
    try:
        content = folder_files.read_json(path.parent, path.name, shown_path)
    except ModelError as error:
        raise ModelError(
            f"{shown_path}: cannot read its config.json ({str(error)[:MAX_LINE]}). It must be "
            "JSON. Download it again."
        ) from error
    if "model_type" not in content:
        raise ModelError(
            f"{shown_path}: its config.json has no model_type, so the model is unknown. "
            "transformers writes one. Download it again."
        )


class BareModel(TrainableModel):
    """A transformers model whose loss is the sum of its outputs.

    The memory of a task's own loss is small next to theirs.
    """

    def prepare_inputs(self, batch: Any, device: torch.device | str) -> Inputs:
        """Return the token ids of `batch`, for both sides of an encoder-decoder."""
        import torch

        ids = torch.from_numpy(batch.input_ids).to(device)  # (B, T)
        inputs = {"input_ids": ids}
        if self.model.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = ids
        return inputs

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        """Return one number computed from all outputs."""
        import torch

        # As losses do: a float32 copy of the logits and its softmax, which backward needs.
        outputs = self.model(**inputs)
        main = outputs.get("logits", outputs[0])
        return torch.log_softmax(main.float(), -1).sum()
