"""From a resolved run to its model in an engine, with initial weights or a checkpoint's."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_ft.checkpoint.manager import CheckpointManager
from dist_ft.checkpoint.manifest import Manifest, TensorInfo
from dist_ft.checkpoint.stored_files import model_is_stored, store_model_files
from dist_ft.config.resolved_run import ResolvedRun
from dist_ft.config.schema import RunConfig
from dist_ft.config.task_facts import task_class
from dist_ft.core import private_folders, scratch
from dist_ft.core.world import World
from dist_ft.storage.filesystem import Store

if TYPE_CHECKING:
    from dist_ft.data.encoding.prompt_encoder import PromptEncoder
    from dist_ft.engine.base import Engine
    from dist_ft.model.adversarial import Adversary
    from dist_ft.model.trainable_model import TrainableModel

log = logging.getLogger("dist_ft.run")


@dataclass(frozen=True)
class BuiltModel:
    """A model in its engine.

    Attributes:
        module: the transformers model with the loss of the task around it.
        engine: computes and updates it.
        new_weights: names of the weights that are in no file, such as those of a new head.
    """

    module: TrainableModel
    engine: Engine
    new_weights: frozenset[str]


def build_engine(run: ResolvedRun, world: World, resumed: bool) -> BuiltModel:
    """Return the model inside the engine of the config.

    Its weights are pre-trained, or empty if `resumed`.
    """
    import torch

    from dist_ft.engine import schedule
    from dist_ft.engine.regularizers import Regularizers

    config = run.config
    use_gpu = config.cluster.gpus_per_worker > 0
    regularizers = Regularizers.from_config(config.tuning)
    depth_scale = schedule.uses_depth_scale(config.tuning)

    engine: Engine
    # `cluster.workers` 0 means one process with plain PyTorch, which needs no DeepSpeed.
    if config.max_workers == 0:
        from dist_ft.engine.torch_engine import TorchEngine

        module, new_weights = _build_module(run, resumed)
        engine = TorchEngine(
            module,
            config.optimizer,
            torch.device("cuda" if use_gpu else "cpu"),
            depth_scale,
            _adversary(config, module),
            regularizers,
        )
        return BuiltModel(module, engine, new_weights)

    from dist_ft.engine import deepspeed_config, deepspeed_engine

    # First the process group: zero.Init creates each weight as a shard of this rank.
    deepspeed_engine.attach_to_process_group(use_gpu)
    settings = deepspeed_config.build_deepspeed_config(config, create_swap_folder(config))
    with deepspeed_engine.zero_init(settings):
        module, new_weights = _build_module(run, resumed)
    engine = deepspeed_engine.DeepSpeedEngine(
        module,
        config.optimizer,
        settings,
        world,
        depth_scale,
        _adversary(config, module),
        regularizers,
    )
    return BuiltModel(module, engine, new_weights)


def create_swap_folder(config: RunConfig) -> str | None:
    """Return this run's private folder in zero.nvme_path, None if the run has no such path.

    DeepSpeed's files there hold weights and optimizer state, under names that any run would use.

    Raises:
        FolderError: others own it or may write to it.
    """
    if not config.zero.nvme_path:
        return None
    parent = Path(config.zero.nvme_path).expanduser()
    return str(private_folders.open_part(parent, f"swap-{config.run.name}", "zero.nvme_path"))


def _adversary(config: RunConfig, module: TrainableModel) -> Adversary | None:
    """Return what perturbs the embeddings of `module` in training, if anything.

    Built before an engine adds its hooks.
    """
    from dist_ft.model.adversarial import Adversary

    section = config.tuning.adversarial
    if section.method == "none":
        return None
    return Adversary(section, module)


def _build_module(run: ResolvedRun, resumed: bool) -> tuple[TrainableModel, frozenset[str]]:
    """Return the model with head, adapters and loss, and the weights that are in no file."""
    from dist_ft.model.adapters import tuning
    from dist_ft.model.loading.load import build_uninitialized_model, load_task_model

    config, cache_dir = run.config, run.config.data.cache_dir
    new_weights = frozenset[str]()
    if resumed:
        # The checkpoint has all weights, so none are downloaded or read from the model's files.
        model = build_uninitialized_model(run.model, cache_dir, run.model_task)
    else:
        model, new_weights = load_task_model(run.model_task, run.model, cache_dir)

    prompt_text = config.tuning.prompt.text
    prompt_ids = ()
    if prompt_text:
        prompt_ids = run.tokenizer(prompt_text, add_special_tokens=False)["input_ids"]

    # Before the loss: it hooks the output layer, which an adapter may replace.
    tuning.apply_tuning(model, config.tuning, config.run.seed, run.model_task, prompt_ids)

    return add_loss(model, run), new_weights


def add_loss(model: Any, run: ResolvedRun) -> TrainableModel:
    """Return a transformers model with the loss of the run's task around it."""
    from dist_ft.model.causal_lm import CausalLM
    from dist_ft.model.task_models import SpecialTokens, TaskModel

    config, task = run.config, run.task
    noise = config.tuning.label_smoothing, config.tuning.neftune_alpha

    if task_class(task.name).reads_formats:
        if task.objective == "minimum_risk":
            from dist_ft.model.minimum_risk import RiskCausalLM

            return RiskCausalLM(model, task.risk, config.tuning.neftune_alpha)

        return CausalLM(model, *noise)

    special = SpecialTokens.from_tokenizer(run.tokenizer, model.config)
    if task.objective == "minimum_risk":
        from dist_ft.model.minimum_risk import RiskSeq2Seq

        return RiskSeq2Seq(model, task, special, task.risk)

    if config.prompting.method == "likelihood":
        from dist_ft.model.label_prompting import LabelPromptModel

        words = build_prompt_encoder(run).label_words()
        return LabelPromptModel(model, task, special, words, config.batch.sequence_length, *noise)

    if config.prompting.method == "prototypes":
        from dist_ft.model.prototypes import PrototypeModel

        return PrototypeModel(model, task, special)

    return TaskModel(model, task, special, *noise)


def build_prompt_encoder(run: ResolvedRun) -> PromptEncoder:
    """Return the encoder of the prompts of a run that scores labels by likelihood."""
    from dist_ft.data.encoding.prompt_encoder import PromptEncoder

    return PromptEncoder(
        run.tokenizer,
        run.config.effective_data,
        run.task,
        run.prompting,
        run.config.batch.sequence_length,
    )


def load_weights(
    run: ResolvedRun, built: BuiltModel, manager: CheckpointManager, manifest: Manifest | None
) -> Manifest | None:
    """Load the checkpoint, or verify that the pre-trained weights arrived.

    Then check that packing works.

    Returns the checkpoint that was loaded: an older one if that of `manifest` is damaged.
    """
    if manifest is not None:
        manifest = manager.load(manifest, built.engine, tensor_infos(built.module))
        log.info("resuming from step %d", manifest.progress.step)
    else:
        _start_from_files(run, built)

    # Only with the weights in place do the losses that this compares mean anything.
    check_packing(run, built.module, built.engine)
    return manifest


def _start_from_files(run: ResolvedRun, built: BuiltModel) -> None:
    """Verify the weights from the model's files, and initialize those that are in no file."""
    import torch

    from dist_ft.engine import regularizers
    from dist_ft.engine.weight_check import verify_weights
    from dist_ft.model import heads
    from dist_ft.model.adapters import tuning
    from dist_ft.model.loading.download import fetch_model

    module, engine, new_weights = built.module, built.engine, built.new_weights

    def name_in_files(name: str) -> str:
        # "" skips the comparison: these weights are in no file
        if name in new_weights:
            return ""
        return tuning.name_in_model_files(name)

    folder = fetch_model(run.model.path, run.model.revision, run.config.data.cache_dir)
    num_verified = verify_weights(
        engine.state_slices(),
        folder,
        getattr(torch, run.model.dtype),
        name_in_files,
        f"{module.model.base_model_prefix}.",
    )
    log.debug("%d parameters equal the model's files", num_verified)

    # Full shapes: the values of a weight follow from its name and shape, not from its shards.
    shapes = {name: info.shape for name, info in tensor_infos(module).items()}
    heads.initialize_new_weights(
        engine.state_slices,
        new_weights,
        shapes,
        module.model.config,
        run.config.run.seed,
    )
    if new_weights:
        # The float32 masters were written; the copies that the forward uses follow only now.
        engine.finish_load(0)

    # Last, because anchor and average start as copies of the final initial weights.
    regularizers.initialize_state(engine.state_slices, new_weights)


def check_packing(run: ResolvedRun, module: TrainableModel, engine: Engine) -> None:
    """Raise ModelError if samples are packed and the model does not keep them apart.

    A collective call.
    """
    from dist_ft.engine.packing_check import require_packing

    if run.config.effective_data.pack:
        # Losses are compared up to rounding, which is coarse in 16-bit formats.
        tolerance = 1e-4 if run.model.dtype == "float32" else 5e-2
        require_packing(engine, module.model.config.vocab_size, tolerance)


def store_model(store: Store, module: TrainableModel, tokenizer: Any) -> None:
    """Store the model's config and tokenizer with the run, so that it can be exported anywhere."""

    if model_is_stored(store):
        return

    with scratch.folder("model") as folder:
        # transformers sets this only when it saves weights, and these stay where they are.
        module.model.config.architectures = [type(module.model).__name__]
        module.model.config.save_pretrained(folder)
        if getattr(module.model, "generation_config", None) is not None:
            module.model.generation_config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

        files: dict[str, bytes] = {}
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                files[path.relative_to(folder).as_posix()] = path.read_bytes()

    store_model_files(store, files)


def tensor_infos(module: TrainableModel) -> dict[str, TensorInfo]:
    """Return {name: full shape} of every weight, also where ZeRO-3 shards it."""
    from dist_ft.model.trainable_model import parameters_by_name

    # ZeRO-3 leaves a placeholder in place of a weight, with the full shape in `ds_shape`.
    return {
        name: TensorInfo(shape=tuple(getattr(p, "ds_shape", p.shape)))
        for name, p in parameters_by_name(module).items()
    }


def tied_weights(module: TrainableModel) -> dict[str, str]:
    """Return {alias: canonical name} of tied weights."""
    from dist_ft.model import trainable_model

    return trainable_model.tied_weight_aliases(module)
