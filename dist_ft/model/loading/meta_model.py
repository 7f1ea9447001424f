"""The model of a run without its weights: its structure on the meta device, from its config.json alone.

Guarantees: no weights are read or fetched, whether the model lies in a folder, a bucket or a hub. Does not run code
that comes with a model unless the config says so.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from dist_ft.config.schema import ModelSection, RunConfig, TaskSection
from dist_ft.core.errors import ModelError, StorageError
from dist_ft.core.logs import redact
from dist_ft.model.adapters import tuning
from dist_ft.model.loading.load import build_uninitialized_model
from dist_ft.model.trainable_model import TrainableModel
from dist_ft.storage import filesystem

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

CONFIG = "config.json"


def build_meta_model(config: RunConfig, task: TaskSection, file: str | None = None) -> PreTrainedModel:
    """Return the model on the meta device, what does not learn frozen and what is added there.

    Args:
        config: the run.
        task: what the model is loaded for, with its labels.
        file: a config.json (or the folder of one) in place of model.path.

    Raises ModelError if there is no such config, or it can not be understood.
    """
    import torch

    with warnings.catch_warnings(), with_local_config(config.model, file) as section, torch.device("meta"):
        warnings.simplefilter("ignore")
        model = build_uninitialized_model(section, None, task)
        text_ids = range(config.tuning.prompt.tokens) if config.tuning.prompt.text else ()
        tuning.apply_tuning(model, config.tuning, config.run.seed, task, list(text_ids))
    return model


@contextlib.contextmanager
def with_local_config(section: ModelSection, file: str | None = None) -> Iterator[ModelSection]:
    """Within, the section's path is a local folder with config.json, and its attention one that needs no package."""
    with tempfile.TemporaryDirectory(prefix="dist_ft-outline-") as folder:
        found = _of_file(file) if file is not None else _of_path(section, folder)
        _require_json(found, section.path if file is None else file)
        if not os.path.samefile(os.path.dirname(found) or ".", folder):
            shutil.copy(found, os.path.join(folder, CONFIG))
        changes: dict[str, Any] = {"path": folder, "revision": None}
        if section.attention.startswith("flash"):
            changes["attention"] = "sdpa"
        try:
            yield section.model_copy(update=changes)
        except ModelError as error:
            said = str(error).replace(folder, section.path if file is None else file)
            raise ModelError(said) from error


def _of_file(path: str) -> str:
    found = os.path.join(path, CONFIG) if os.path.isdir(path) else path
    if not os.path.isfile(found):
        raise ModelError(
            f"--model-config={path}: there is no such file; give a model's config.json, or a folder that "
            "holds one"
        )
    return found


def _of_path(section: ModelSection, folder: str) -> str:
    """Return a local file with the config of the model at `section.path`; one from a bucket is put into `folder`."""
    path = section.path
    if not filesystem.is_local(path):
        return _from_bucket(path, folder)
    local = filesystem.local_path(path)
    if os.path.isdir(local):
        found = os.path.join(local, CONFIG)
        if not os.path.isfile(found):
            raise ModelError(
                f"model.path={path}: no config.json there; a plan needs a model's config.json (no "
                "weights); give its folder, or --model-config FILE"
            )
        return found
    if path.startswith((".", "/", "~", "file:")) or path.count("/") != 1:
        raise ModelError(
            f"model.path={path}: there is no such folder; give a model folder, an fsspec URL of one, or a "
            "hub name such as org/name, or --model-config FILE"
        )
    return _from_hub(path, section.revision)


def _from_bucket(url: str, folder: str) -> str:
    try:
        content = filesystem.Store(url).read(CONFIG)
    except StorageError as error:
        raise ModelError(
            redact(
                f"model.path={url}: its config.json can not be read from here ({error}); a plan needs "
                "no more than that; give --model-config FILE"
            )
        ) from error
    found = os.path.join(folder, CONFIG)
    with open(found, "wb") as file:
        file.write(content)
    return found


def _from_hub(name: str, revision: str | None) -> str:
    """Fetch config.json alone (HF_TOKEN from the environment opens gated models)."""
    from huggingface_hub import hf_hub_download

    logging.getLogger("huggingface_hub").setLevel(
        logging.ERROR
    )  # each of its tries would be a line
    try:
        return hf_hub_download(name, CONFIG, revision=revision)
    except Exception as error:
        raise ModelError(
            redact(
                f"model.path={name}: no folder of that name here, and the hub does not give its config.json "
                f"({type(error).__name__}); check the spelling, set HF_TOKEN for a gated model, or give "
                "--model-config FILE"
            )
        ) from error


def _require_json(file: str, told: str) -> None:
    try:
        with open(file, encoding="utf-8") as lines:
            content = json.load(lines)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{told}: its config.json can not be read ({str(error)[:100]}); it must be JSON; fetch it "
            "anew"
        ) from error
    if not isinstance(content, dict) or "model_type" not in content:
        raise ModelError(
            f"{told}: its config.json names no model_type, so what it describes is not known; "
            "transformers writes one; fetch it anew"
        )


class BareModel(TrainableModel):
    """A transformers model whose outputs are summed: what a task's loss adds to memory is small beside them."""

    def inputs(self, batch: Any, device: torch.device | str) -> dict[str, Any]:
        """Return the token ids of `batch`, for both sides of an encoder-decoder."""
        import torch

        ids = torch.from_numpy(batch.input_ids).to(device)
        return {
            "input_ids": ids,
            **({"decoder_input_ids": ids} if self.model.config.is_encoder_decoder else {}),
        }

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        """Return a number made of all outputs."""
        import torch

        outputs = self.model(**inputs)
        main = outputs.get("logits", outputs[0])
        return torch.log_softmax(main.float(), -1).sum()
