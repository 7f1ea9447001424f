"""From a run to a Hugging Face folder that any tool loads.

Guarantees: the folder appears under its name only after it was loaded again with plain transformers
    and gave the same
logits as the weights of the checkpoint; one process, no DeepSpeed, no Ray, no access to the
original model. Reads fragments tensor by tensor; the whole model must fit into memory twice (once
while it is compared).
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from dist_ft.checkpoint import discovery
from dist_ft.checkpoint import manifest as manifests
from dist_ft.checkpoint.fragments import FragmentReader, FragmentRequest
from dist_ft.checkpoint.manifest import Manifest, TensorInfo
from dist_ft.config.load import STORED, load_stored_section, read_stored_config
from dist_ft.config.sections.prompting import PromptingSection, of_model
from dist_ft.config.sections.section import Section
from dist_ft.config.sections.task import TaskSection
from dist_ft.config.sections.tuning import ADDED, TuningSection
from dist_ft.config.sections.tuning import MERGED as MERGEABLE
from dist_ft.core.errors import CheckpointError
from dist_ft.core.world import Collectives, World
from dist_ft.metrics import best as bests
from dist_ft.model import heads
from dist_ft.model.adapters import adapter_files, tuning
from dist_ft.model.adapters.adapter_files import INFO_FILE
from dist_ft.model.loading.load import extra_model_kwargs, model_from_config, probe_outputs
from dist_ft.storage.filesystem import Store

if TYPE_CHECKING:
    import torch

S = TypeVar("S", bound=Section)

MERGED = 1e-3
"""How much logits may change, relative to the largest, when an adapter is merged in float32."""
ROUNDING = 16
"""Roundings, of the largest logit, by which the same weights may give other logits."""
MODEL_FOLDER = "model"
"""Folder of a run with the model's config, tokenizer and chat template."""


def export_run(
    run_url: str,
    out: str,
    step: int | None = None,
    dtype: str | None = None,
    adapter: bool = False,
    best: bool = False,
    finish: Callable[[Path, Manifest], None] = lambda folder, manifest: None,
    average: bool | None = None,
) -> str:
    """Write the model of a run's newest checkpoint (or of `step`) to the local folder `out`; return its path.

    Adapters are added into the weights they stand beside, in float32.

    Args:
        run_url: fsspec URL of the run's folder.
        out: folder that does not exist yet, or is empty.
        step: a committed step; none: the newest sound checkpoint.
        dtype: "float32" or "bfloat16"; none: as the model's config says.
        adapter: write the adapter alone, as `peft` loads it.
        best: of the checkpoints there are, the best by checkpoint.best_by.
        finish: called with the whole folder and what it was made from, before the folder appears.
        average: the moving average of the weights (tuning.ema_decay); none: if that is what was
            evaluated.
    """
    target = Path(out).expanduser().absolute()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise CheckpointError(
            f"--out={out}: {'the folder is not empty' if target.is_dir() else 'a file is there'}; a "
            "new or an empty folder is allowed; give another"
        )
    store = Store(run_url)
    manifest = find_manifest(store, find_best_step(store) if best else step)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as temporary:
        folder = Path(temporary) / "model"
        if adapter:
            _save_adapter(store, manifest, folder, average)
        else:
            model, tokenizer = load_trained_model(store, manifest, dtype, average)
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            (folder / INFO_FILE).write_text(json.dumps(_about(store), indent=1), "utf-8")
            _compare(model, load_task(store), folder)
        finish(folder, manifest)
        if target.exists():
            target.rmdir()
        shutil.move(str(folder), target)
    return str(target)


def _about(store: Store) -> dict[str, Any]:
    """Return what one must know to ask the model as it was trained, besides what transformers keeps."""
    stored = read_stored_config(store)
    task, prompting = _asked(store)
    return {
        "task": task.model_dump(mode="json"),
        "prompting": prompting.model_dump(mode="json"),
        "attention": (stored.get("model") or {}).get("attention", "sdpa"),
        "prompt_template": (stored.get("data") or {}).get("prompt_template", "{prompt}\n"),
        "sequence_length": (stored.get("batch") or {}).get("sequence_length"),
    }


def read_exported_task(folder: Path) -> TaskSection:
    """Return what the model of an exported folder does."""
    about = json.loads((folder / INFO_FILE).read_text("utf-8"))
    return load_stored_section(about, "task", TaskSection, str(folder / INFO_FILE))


def find_manifest(store: Store, step: int | None) -> Manifest:
    """Return the manifest to export, its files verified."""
    newest = discovery.find_latest(store, World(), Collectives()) if step is None else None
    if newest is not None:
        return newest
    names = discovery.list_committed(store)
    if not names:
        raise CheckpointError(
            f"{store.redacted_url()}: no committed checkpoint; give the folder of a run (<storage>/<name>)"
        )
    steps = {
        (manifests.parse_folder(name) or (0, 0))[0]: name for name in reversed(names)
    }  # newest attempt wins
    if step not in steps:
        raise CheckpointError(
            f"--step={step}: not among the checkpoints of {store.redacted_url()}; there are "
            f"{', '.join(str(found) for found in sorted(steps))}; give one of them"
        )
    manifest = discovery.load_manifest(store, steps[step])
    discovery.verify_checksums(store, manifest, World())
    return manifest


def find_best_step(store: Store) -> int:
    """Return the step of the best checkpoint by the metric of the run's checkpoint.best_by."""
    metric = str((read_stored_config(store).get("checkpoint") or {}).get("best_by", "loss"))
    found = [
        (manifest.progress.step, manifest.evaluation[metric])
        for manifest in (
            discovery.load_manifest(store, name) for name in discovery.list_committed(store)
        )
        if metric in manifest.evaluation
    ]
    if not found:
        raise CheckpointError(
            f"--best: no checkpoint of {store.redacted_url()} is of a step that was evaluated by {metric}; "
            "needs evaluation.every_steps and checkpoint.keep_best; export the newest"
        )
    return bests.find_best(metric, found)[0]


def load_trained_model(
    store: Store, manifest: Manifest, dtype: str | None = None, average: bool | None = None
) -> tuple[Any, Any]:
    """Return (model, tokenizer) with the weights of a checkpoint, on the CPU; adapters are merged into them.

    `average`: see `export_run`.
    """
    import torch

    method = load_tuning(store).method
    if method in ADDED and method not in MERGEABLE:
        raise CheckpointError(
            f"{store.redacted_url()}: what {method} adds can not be added into the model's weights; it is "
            "exported alone; use --adapter"
        )
    model, _, tokenizer, wanted = _load(store, manifest, dtype, average)
    if method not in ADDED:
        return model.eval(), tokenizer
    with torch.no_grad():
        before = probe_outputs(model.eval())
        tuning.merge_adapters(model)
        difference = (probe_outputs(model) - before).abs().max().item() / before.abs().max().item()
    if difference > MERGED:
        raise CheckpointError(
            f"{store.redacted_url()}: with its adapter merged the model does not give the same logits "
            f"(relative difference {difference:.1e}); nothing was exported; use --adapter"
        )
    return _in_format(model, load_task(store), wanted), tokenizer


def _in_format(model: Any, task: TaskSection, wanted: torch.dtype) -> Any:
    """Return the model with weights as `wanted`; what it computes with besides is made anew, as when it is loaded."""
    import torch

    made = model_from_config(model.config, task, wanted)
    targets = dict(made.named_parameters()) | {
        name: made.get_buffer(name)
        for name in made.state_dict()
        if name in dict(made.named_buffers())
    }
    values = model.state_dict()
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(values[name])
    return made.eval()


def _stored_section(store: Store, name: str, model: type[S]) -> S:
    return load_stored_section(read_stored_config(store), name, model, store.redacted_url(STORED))


def load_tuning(store: Store) -> TuningSection:
    """Return which weights learned in the run at `store`."""
    return _stored_section(store, "tuning", TuningSection)


def load_task(store: Store) -> TaskSection:
    """Return what the model itself of the run at `store` does: one that was asked for labels continues text."""
    return of_model(*_asked(store))


def _asked(store: Store) -> tuple[TaskSection, PromptingSection]:
    """Return the task of the run at `store`, and how its model was asked: with its labels, its examples in place."""
    task = _stored_section(store, "task", TaskSection)
    prompting = _stored_section(store, "prompting", PromptingSection)
    if prompting.method == "none":
        return task, prompting
    labels = (
        task.labels
        or tuple(prompting.verbalizers)
        or tuple(json.loads(store.read("data/labels.json")))
    )
    if prompting.shots:
        templates = tuple(json.loads(store.read("data/examples.json")))
        prompting = prompting.model_copy(update={"templates": templates, "shots": 0})
    return task.model_copy(update={"labels": labels}), prompting


def _load(
    store: Store, manifest: Manifest, dtype: str | None, average: bool | None
) -> tuple[Any, Any, Any, Any]:
    """Return model, peft's model around it (or None), tokenizer, and the number format to export in."""
    import torch
    from transformers import AutoConfig, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        if "config.json" not in store.child(MODEL_FOLDER).download(folder):
            raise CheckpointError(
                f"{store.redacted_url(MODEL_FOLDER)}: no config.json there; every run keeps its model's config and "
                "tokenizer; give the folder of a run (<storage>/<name>)"
            )
        config = AutoConfig.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    wanted = getattr(torch, dtype) if dtype else config.dtype or torch.float32
    section, task = load_tuning(store), load_task(store)
    model = model_from_config(config, task, torch.float32 if section.method in ADDED else wanted)
    around = tuning.apply_tuning(model, section, 0, task)
    parameters = dict(model.named_parameters())
    shapes = {
        name: TensorInfo(shape=tuple(parameter.shape)) for name, parameter in parameters.items()
    }
    manifests.require_same_tensors(
        manifest.tensors, shapes, discovery.checkpoint_store(store, manifest).redacted_url()
    )
    targets = parameters | dict(model.named_buffers())
    with torch.no_grad():
        for name, values in whole_tensors(
            discovery.open_reader(store, manifest), manifest, targets, _learned_key(store, average)
        ):
            targets[name].copy_(values)
    return model.eval(), around, tokenizer, wanted


def _learned_key(store: Store, average: bool | None) -> str:
    """Return the state of learned weights that is exported: their values, or their average."""
    stored = read_stored_config(store)
    if average and not load_tuning(store).ema_decay:
        raise CheckpointError(
            f"--ema: the run at {store.redacted_url()} kept no average of its weights (tuning.ema_decay); "
            "allowed where it did; export it without --ema"
        )
    evaluated = (stored.get("evaluation") or {}).get("weights") == "ema"
    return "ema" if average or (average is None and evaluated) else "param"


def _save_adapter(store: Store, manifest: Manifest, folder: Path, average: bool | None) -> None:
    """Write what a run added to its model, and require that it is read back as it was."""
    import torch

    section, task = load_tuning(store), load_task(store)
    if section.method not in ADDED:
        raise CheckpointError(
            f"--adapter: the run was made with {section.method} (tuning); allowed where an adapter "
            "learned; export it without --adapter"
        )
    model, around, tokenizer, _ = _load(store, manifest, "float32", average)
    adapter_files.save_adapter(model, around, section, _base(store), folder)
    tokenizer.save_pretrained(folder)
    path, revision = _base(store)
    said = {
        **_about(store),
        "tuning": section.model_dump(mode="json"),
        "base": {"path": path, "revision": revision},
    }
    (folder / INFO_FILE).write_text(json.dumps(said, indent=1), "utf-8")
    adapter_files.check_round_trip(
        model, model_from_config(model.config, task, torch.float32).eval(), section, task, folder
    )


def _base(store: Store) -> tuple[str, str | None]:
    """Return path and revision of the model the adapter belongs to."""
    section = read_stored_config(store)["model"]
    return str(section["path"]), section.get("revision")


def whole_tensors(
    reader: FragmentReader,
    manifest: Manifest,
    targets: dict[str, torch.Tensor],
    learned: str = "param",
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor) of everything in the checkpoint that the model holds; raises if a weight is missing.

    `learned` is the state of the weights that learn which is asked for.
    """
    import torch

    keys = {
        name: key for name, key in sorted(reader.keys()) if key in (learned, "frozen", "buffer")
    }
    missing = sorted(set(manifest.tensors) - set(keys))
    if missing:
        raise CheckpointError(
            f"{missing[0]}: in the run's list of weights but not in the files of its checkpoint of "
            f"step {manifest.progress.step}; export another step"
        )
    names = [name for name in keys if name in targets]
    requests = [
        FragmentRequest(i, name, keys[name], 0, targets[name].numel())
        for i, name in enumerate(names)
    ]
    for index, values in reader.read_many(requests):
        yield names[index], torch.from_numpy(values).view(targets[names[index]].shape)


def _compare(model: Any, task: TaskSection, folder: Path) -> None:
    """Raise CheckpointError unless the written folder, loaded anew, has the weights and gives the logits of `model`.

    Weights to the bit, logits but for rounding: where weights lie in memory may change the order of
    a sum.
    """
    import torch

    with torch.no_grad():
        expected = probe_outputs(model)
        pair: Any = heads.auto_class(task).from_pretrained(
            folder,
            dtype=model.dtype,
            output_loading_info=True,
            **extra_model_kwargs(model.config, task),
        )
        loaded, info = pair
        for tensor in (
            *loaded.parameters(),
            *loaded.buffers(),
        ):  # where a mapped file lies in memory decides last bits
            tensor.data = tensor.data.clone()
        got = probe_outputs(loaded.eval())
    held, written = model.state_dict(), loaded.state_dict()
    same = held.keys() == written.keys() and all(
        torch.equal(held[name], written[name]) for name in held
    )
    rounding = ROUNDING * torch.finfo(model.dtype).eps * expected.abs().max()
    if (
        info["missing_keys"]
        or not same
        or not torch.allclose(expected, got, rtol=0, atol=float(rounding))
    ):
        worst = (expected - got).abs().max().item()
        raise CheckpointError(
            f"{folder}: loaded again it does not give the same logits (largest difference {worst:g}, "
            f"missing {sorted(info['missing_keys'])[:3]}); nothing was exported"
        )
