"""From a config to its model inside an engine, with the weights it begins with or goes on from."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any

from dist_ft.checkpoint.export import MODEL
from dist_ft.checkpoint.manager import CheckpointManager
from dist_ft.checkpoint.manifest import Manifest, TensorInfo
from dist_ft.config.schema import RunConfig
from dist_ft.core.world import World
from dist_ft.storage.filesystem import Store

if TYPE_CHECKING:
    from dist_ft.data.encoding.prompt_encoder import PromptEncoder
    from dist_ft.engine.base import Engine
    from dist_ft.model.adversarial import Adversary
    from dist_ft.model.trainable_model import TrainableModel

log = logging.getLogger("dist_ft.run")


def open_engine(
    config: RunConfig, world: World, resumed: bool, tokenizer: Any
) -> tuple[TrainableModel, Engine, frozenset[str]]:
    """Return the model inside the engine the config asks for, and which of its weights are new (`heads`).

    Its weights are pre-trained, or empty if `resumed`.
    """
    import torch

    from dist_ft.engine.regularizers import Regularizers

    use_gpu = config.cluster.gpus_per_worker > 0
    if config.max_workers == 0:
        from dist_ft.engine import schedule
        from dist_ft.engine.torch_engine import TorchEngine

        module, new = _tuned(config, resumed, tokenizer)
        device = torch.device("cuda" if use_gpu else "cpu")
        return (
            module,
            TorchEngine(
                module,
                config.optimizer,
                device,
                schedule.uses_depth_scale(config.tuning),
                _adversary(config, module),
                Regularizers.of(config.tuning),
            ),
            new,
        )
    from dist_ft.engine import deepspeed_config, schedule
    from dist_ft.engine import deepspeed_engine as sharded

    sharded.attach_to_process_group(use_gpu)
    settings = deepspeed_config.build_deepspeed_config(config)
    with sharded.zero_init(settings):
        module, new = _tuned(config, resumed, tokenizer)
    return (
        module,
        sharded.DeepSpeedEngine(
            module,
            config.optimizer,
            settings,
            world,
            schedule.uses_depth_scale(config.tuning),
            _adversary(config, module),
            Regularizers.of(config.tuning),
        ),
        new,
    )


def _adversary(config: RunConfig, module: TrainableModel) -> Adversary | None:
    """Return who moves the embeddings of `module` in training, if anybody; made before an engine adds its hooks."""
    from dist_ft.model.adversarial import Adversary

    section = config.tuning.adversarial
    return Adversary(section, module) if section.method != "none" else None


def _tuned(config: RunConfig, resumed: bool, tokenizer: Any) -> tuple[TrainableModel, frozenset[str]]:
    """Return the model with its head and adapters, its loss around it, and which of its weights are new."""
    from dist_ft.model.adapters import tuning
    from dist_ft.model.loading.load import build_uninitialized_model, load_task_model

    cache, new = config.data.cache_dir, frozenset[str]()
    if resumed:
        model = build_uninitialized_model(config.model, cache, config.model_task)
    else:
        model, new = load_task_model(config.model_task, config.model, cache)
    text = config.tuning.prompt.text
    tuning.apply_tuning(
        model,
        config.tuning,
        config.run.seed,
        config.model_task,
        tokenizer(text, add_special_tokens=False)["input_ids"] if text else (),
    )
    return wrapped(model, config, tokenizer), new


def wrapped(model: Any, config: RunConfig, tokenizer: Any) -> TrainableModel:
    """Return a transformers model with the loss of the config's task around it, or what it is asked by."""
    from dist_ft.model.causal_lm import CausalLM
    from dist_ft.model.task_models import SpecialTokens, TaskModel

    noise = config.tuning.label_smoothing, config.tuning.neftune_alpha
    if config.task.objective == "minimum_risk":
        from dist_ft.model.minimum_risk import RiskCausalLM, RiskSeq2Seq

        if config.task.name == "causal_lm":
            return RiskCausalLM(model, config.task.risk, config.tuning.neftune_alpha)
        return RiskSeq2Seq(
            model, config.task, SpecialTokens.of(tokenizer, model.config), config.task.risk
        )
    if config.task.name == "causal_lm":
        return CausalLM(model, *noise)
    special = SpecialTokens.of(tokenizer, model.config)
    if config.prompting.method == "likelihood":
        from dist_ft.model.label_prompting import LabelPromptModel

        words = prompt_encoder(config, tokenizer).words()
        return LabelPromptModel(model, config.task, special, words, config.batch.sequence_length, *noise)
    if config.prompting.method == "prototypes":
        from dist_ft.model.prototypes import PrototypeModel

        return PrototypeModel(model, config.task, special)
    return TaskModel(model, config.task, special, *noise)


def prompt_encoder(config: RunConfig, tokenizer: Any) -> PromptEncoder:
    """Return what makes the prompts of a run that asks for labels by likelihood."""
    from dist_ft.data.encoding.prompt_encoder import PromptEncoder

    return PromptEncoder(
        tokenizer, config.reading, config.task, config.prompting, config.batch.sequence_length
    )


def with_whole_head(config: RunConfig) -> RunConfig:
    """Return the config with a model whose head has a row for each label, where task.grow_head adds some."""
    from dist_ft.model.loading.grow_head import grow_head
    from dist_ft.model.loading.download import cache_folder, fetch_model

    if not config.task.grow_head:
        return config
    folder = fetch_model(config.model.path, config.model.revision, config.data.cache_dir)
    grown = grow_head(
        folder, config.task, config.run.seed, cache_folder(config.data.cache_dir) / "models"
    )
    return (
        config
        if grown == folder
        else config.model_copy(
            update={"model": config.model.model_copy(update={"path": grown, "revision": None})}
        )
    )


def fill(
    config: RunConfig,
    module: TrainableModel,
    engine: Engine,
    manager: CheckpointManager,
    manifest: Manifest | None,
    new: frozenset[str],
) -> Manifest | None:
    """Load the checkpoint, or check that the pre-trained weights arrived; then check that packing works.

    Returns the checkpoint that was loaded: an older one where `manifest` is damaged.
    """
    import torch

    from dist_ft.engine import regularizers
    from dist_ft.engine.weight_check import verify_weights
    from dist_ft.model import heads
    from dist_ft.model.adapters import tuning
    from dist_ft.model.loading.download import fetch_model

    if manifest is not None:
        manifest = manager.load(manifest, engine, tensors(module))
        log.info("going on from step %d", manifest.progress.step)
    else:
        folder = fetch_model(config.model.path, config.model.revision, config.data.cache_dir)
        compared = verify_weights(
            engine.state_slices(),
            folder,
            getattr(torch, config.model.dtype),
            lambda name: "" if name in new else tuning.name_in_model_files(name),
            f"{module.model.base_model_prefix}.",
        )
        log.debug("%d parameters hold what the files say", compared)
        heads.initialize_new_weights(
            engine.state_slices,
            new,
            {name: found.shape for name, found in tensors(module).items()},
            module.model.config,
            config.run.seed,
        )
        if new:
            engine.finish_load(0)
        regularizers.initialize_state(engine.state_slices, new)
    probe(config, module, engine)
    return manifest


def probe(config: RunConfig, module: TrainableModel, engine: Engine) -> None:
    """Raise ModelError if samples are packed and this model does not keep them apart; a collective call."""
    from dist_ft.engine.packing_check import require_packing

    if config.reading.pack:
        require_packing(
            engine,
            module.model.config.vocab_size,
            1e-4 if config.model.dtype == "float32" else 5e-2,
        )


def store_model(store: Store, module: TrainableModel, tokenizer: Any) -> None:
    """Keep the model's config and tokenizer with the run, so that it can be exported anywhere."""
    import tempfile
    from pathlib import Path

    if store.exists(f"{MODEL}/.complete"):
        return
    with tempfile.TemporaryDirectory() as folder:
        module.model.config.architectures = [type(module.model).__name__]
        module.model.config.save_pretrained(folder)
        if getattr(module.model, "generation_config", None) is not None:
            module.model.generation_config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                store.write(f"{MODEL}/{path.relative_to(folder).as_posix()}", path.read_bytes())
    store.write(f"{MODEL}/.complete", json.dumps({}).encode())


def tensors(module: TrainableModel) -> dict[str, TensorInfo]:
    """Return the shape of every weight, whole."""
    from dist_ft.model.trainable_model import parameters_by_name

    return {
        name: TensorInfo(shape=tuple(getattr(p, "ds_shape", p.shape)))
        for name, p in parameters_by_name(module).items()
    }


def aliases(module: TrainableModel) -> dict[str, str]:
    """Return {other name: first name} of tied weights."""
    from dist_ft.model import trainable_model

    return trainable_model.tied_weight_aliases(module)
