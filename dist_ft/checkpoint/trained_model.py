"""Loads a checkpoint of a run as a transformers model, in one process.

DeepSpeed, Ray and the original model are not needed: a run stores its model's config and tokenizer.
Fragments are read tensor by tensor.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from dist_ft.checkpoint import discovery
from dist_ft.checkpoint import manifest as manifests
from dist_ft.checkpoint.fragments import FragmentReader, FragmentRequest
from dist_ft.checkpoint.manifest import DamagedError, Manifest, TensorInfo
from dist_ft.checkpoint.stored_files import (
    MODEL_FOLDER,
    read_labels,
    read_templates,
    require_stored_files,
)
from dist_ft.config.load import STORED, load_stored_section, read_stored_config
from dist_ft.config.sections.prompting import PromptingSection, get_model_task
from dist_ft.config.sections.section import Section
from dist_ft.config.sections.task import TaskSection
from dist_ft.config.sections.tuning import ADAPTER_METHODS, MERGEABLE_METHODS, TuningSection
from dist_ft.core import scratch
from dist_ft.core.errors import CheckpointError
from dist_ft.core.world import Collectives, World
from dist_ft.metrics import best as best_metric
from dist_ft.model.adapters import tuning
from dist_ft.model.loading.load import model_from_config, probe_outputs
from dist_ft.pretrained import pretrained_model
from dist_ft.pretrained.pretrained_model import Source
from dist_ft.storage.filesystem import Store

if TYPE_CHECKING:
    import torch

log = logging.getLogger("dist_ft.checkpoint")
S = TypeVar("S", bound=Section)

MAX_MERGE_DIFFERENCE = 1e-3
"""Largest change of the logits, relative to the largest logit, by merging an adapter in float32."""


class TrainedModel(NamedTuple):
    """A transformers model with the weights of a checkpoint, and its tokenizer."""

    model: Any
    tokenizer: Any


class CheckpointModel(NamedTuple):
    """A model with the weights of a checkpoint, adapters not merged.

    Attributes:
        peft_model: the peft model around it; None without one.
        dtype: the type to export the weights in.
    """

    model: Any
    peft_model: Any
    tokenizer: Any
    dtype: torch.dtype


class TaskSettings(NamedTuple):
    """The task of a run and how its model is prompted, with labels and examples filled in."""

    task: TaskSection
    prompting: PromptingSection


def find_manifest(store: Store, step: int | None) -> Manifest:
    """Return the manifest of the checkpoint at `step` (default: the latest), its files verified."""
    if step is None:
        latest = discovery.find_latest(store, World(), Collectives())
        if latest is not None:
            return latest

    names = discovery.list_committed(store)
    if not names:
        raise CheckpointError(
            f"{store.redacted_url()}: no committed checkpoint. Give the folder of a run "
            "(<storage>/<name>)."
        )

    # Names come latest first. Reversed, of two checkpoints of one step that of the latest attempt
    # is written last and wins.
    names_by_step: dict[int, str] = {}
    for name in reversed(names):
        names_by_step[discovery.sort_key(name).step] = name

    if step not in names_by_step:
        available = ", ".join(str(found) for found in sorted(names_by_step))
        raise CheckpointError(
            f"--step={step}: no checkpoint of {store.redacted_url()} has this step. Available: "
            f"{available}. Choose one of them."
        )

    manifest = discovery.load_manifest(store, names_by_step[step])
    discovery.verify_checksums(store, manifest, World())
    return manifest


def find_best_step(store: Store) -> int:
    """Return the step of the best checkpoint; see `find_best`."""
    return find_best(store).progress.step


def find_best(store: Store) -> Manifest:
    """Return the best checkpoint by the metric of the run's checkpoint.best_by.

    Of one step that several attempts evaluated, it is the checkpoint that was evaluated best. Those
    with a damaged manifest are skipped, and the reason is logged.

    Raises:
        CheckpointError: no checkpoint was evaluated, or one is of a newer dist_ft.
    """
    # The config of a run of an older version may lack the section or the field.
    section = read_stored_config(store).get("checkpoint") or {}
    metric = str(section.get("best_by", "loss"))

    evaluated: list[Manifest] = []
    for name in discovery.list_committed(store):
        try:
            manifest = discovery.load_manifest(store, name)
        except DamagedError as error:
            log.warning("checkpoint %s is skipped: %s", name, error)
            continue

        if metric in manifest.evaluation:
            evaluated.append(manifest)

    if not evaluated:
        raise CheckpointError(
            f"--best: no checkpoint of {store.redacted_url()} was evaluated by {metric}. --best "
            "requires evaluation.every_steps and checkpoint.keep_best. Export without --best."
        )
    # Of equal ones the first, which is the latest.
    return min(evaluated, key=lambda item: best_metric.sort_key(metric, item.evaluation[metric]))


def load_trained_model(
    store: Store, manifest: Manifest, dtype: str | None = None, average: bool | None = None
) -> TrainedModel:
    """Return the model with the weights of a checkpoint, on the CPU, with adapters merged.

    Args:
        store: the run's folder.
        manifest: the checkpoint.
        dtype: "float32" or "bfloat16". Default: as in the model's config.
        average: load the moving average of the weights (tuning.ema_decay). Default: if the average
            was evaluated.
    """
    import torch

    # Before the model is loaded, which takes minutes for a large one.
    method = load_tuning(store).method
    if method in ADAPTER_METHODS and method not in MERGEABLE_METHODS:
        raise CheckpointError(
            f"{store.redacted_url()}: {method} cannot be merged into the model's weights. Only the "
            "adapter can be exported. Use --adapter."
        )

    model, _, tokenizer, torch_dtype = load_checkpoint_model(store, manifest, dtype, average)
    if method not in ADAPTER_METHODS:
        return TrainedModel(model.eval(), tokenizer)

    # Merging is checked on the model itself: an adapter that does not fit its weights, or a layer
    # that merges wrongly, changes the logits.
    with torch.no_grad():
        before = probe_outputs(model.eval())
        tuning.merge_adapters(model)
        change = (probe_outputs(model) - before).abs().max().item()
        difference = change / before.abs().max().item()

    if difference > MAX_MERGE_DIFFERENCE:
        raise CheckpointError(
            f"{store.redacted_url()}: merging the adapter changes the logits (relative difference "
            f"{difference:.1e}). Nothing was exported. Use --adapter."
        )
    return TrainedModel(_convert_dtype(model, load_task(store), torch_dtype), tokenizer)


def _convert_dtype(model: Any, task: TaskSection, dtype: torch.dtype) -> Any:
    """Return the model with weights of type `dtype`.

    What is not saved, such as rotary frequencies, is created again as when the model is loaded,
    instead of rounded.
    """
    import torch

    converted = model_from_config(model.config, task, dtype)
    targets: dict[str, torch.Tensor] = dict(converted.named_parameters())

    # The state dict has only the buffers that are saved.
    buffers = dict(converted.named_buffers())
    for name in converted.state_dict():
        if name in buffers:
            targets[name] = converted.get_buffer(name)

    values = model.state_dict()
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(values[name])

    return converted.eval()


def _load_section(store: Store, name: str, model: type[S]) -> S:
    return load_stored_section(read_stored_config(store), name, model, store.redacted_url(STORED))


def load_tuning(store: Store) -> TuningSection:
    """Return the tuning settings of the run at `store`."""
    return _load_section(store, "tuning", TuningSection)


def load_task(store: Store) -> TaskSection:
    """Return the task of the run's model itself: a model prompted for labels generates text."""
    return get_model_task(*load_task_settings(store))


def load_task_settings(store: Store) -> TaskSettings:
    """Return the task of the run at `store` and how its model is prompted."""
    task = _load_section(store, "task", TaskSection)
    prompting = _load_section(store, "prompting", PromptingSection)
    if prompting.method == "none":
        return TaskSettings(task, prompting)

    # From the config if it names them, else those that the run found in its data.
    labels = task.labels or tuple(prompting.verbalizers) or read_labels(store)

    # The examples that the run drew, so that prompts are the same as in training.
    if prompting.shots:
        templates = read_templates(store)
        prompting = prompting.model_copy(update={"templates": templates, "shots": 0})

    return TaskSettings(task.model_copy(update={"labels": labels}), prompting)


def load_checkpoint_model(
    store: Store, manifest: Manifest, dtype: str | None, average: bool | None
) -> CheckpointModel:
    """Return the model with the weights of a checkpoint; arguments as of `load_trained_model`."""
    import torch
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()

    require_stored_files(store)

    # transformers reads from a local folder only.
    with scratch.folder("model") as path:
        folder = str(path)
        store.child(MODEL_FOLDER).download(folder)
        source = Source(folder, store.redacted_url(MODEL_FOLDER))
        config = pretrained_model.read_config(source)
        tokenizer = pretrained_model.read_tokenizer(source)

    torch_dtype = config.dtype or torch.float32
    if dtype:
        torch_dtype = getattr(torch, dtype)

    # Adapters are merged in float32: in bfloat16 a small update would be rounded away.
    section = load_tuning(store)
    task = load_task(store)
    load_dtype = torch_dtype
    if section.method in ADAPTER_METHODS:
        load_dtype = torch.float32
    model = model_from_config(config, task, load_dtype)
    peft_model = tuning.apply_tuning(model, section, 0, task)

    # Fragments are found by flat offsets, which alone would also fit a smaller model.
    parameters = dict(model.named_parameters())
    shapes = {
        name: TensorInfo(shape=tuple(parameter.shape)) for name, parameter in parameters.items()
    }
    where = discovery.checkpoint_store(store, manifest).redacted_url()
    manifests.require_same_tensors(manifest.tensors, shapes, where)

    targets = parameters | dict(model.named_buffers())
    reader = discovery.open_reader(store, manifest)
    trained_key = _key_of_trained_weights(store, average)
    with torch.no_grad():
        for name, values in read_tensors(reader, manifest, targets, trained_key):
            targets[name].copy_(values)

    return CheckpointModel(model.eval(), peft_model, tokenizer, torch_dtype)


def _key_of_trained_weights(store: Store, average: bool | None) -> str:
    """Return the key of the trained weights to export: "param", or "ema" for their average."""
    if average and not load_tuning(store).ema_decay:
        raise CheckpointError(
            f"--ema: the run at {store.redacted_url()} has no average of its weights. --ema is "
            "allowed for runs with tuning.ema_decay. Export it without --ema."
        )

    # By default, the weights whose evaluation the user saw.
    if average is None:
        evaluation = read_stored_config(store).get("evaluation") or {}
        average = evaluation.get("weights") == "ema"

    return "ema" if average else "param"


def read_tensors(
    reader: FragmentReader,
    manifest: Manifest,
    targets: dict[str, torch.Tensor],
    trained_key: str = "param",
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor) of each tensor of the model that is in the checkpoint.

    Args:
        reader: reads the checkpoint.
        manifest: manifest of the checkpoint.
        targets: the model's tensors, by name.
        trained_key: the state of trained weights to read, "param" or "ema".

    Raises:
        CheckpointError: a weight is missing.
    """
    import torch

    # All other keys are optimizer state. A weight that became trainable in a later attempt has two
    # keys, as the shared files still have its frozen values: sorted, "param" comes last and wins.
    keys: dict[str, str] = {}
    for name, key in sorted(reader.keys()):
        if key in (trained_key, "frozen", "buffer"):
            keys[name] = key

    missing = sorted(set(manifest.tensors) - set(keys))
    if missing:
        raise CheckpointError(
            f"{missing[0]}: listed in the manifest of step {manifest.progress.step} but missing in "
            "the files of that checkpoint. Export another step."
        )

    names = [name for name in keys if name in targets]
    requests = [
        FragmentRequest(i, name, keys[name], 0, targets[name].numel())
        for i, name in enumerate(names)
    ]

    # Values come in the order in which they are complete, which is not that of `names`.
    for index, values in reader.read_many(requests):
        name = names[index]
        yield name, torch.from_numpy(values).view(targets[name].shape)
