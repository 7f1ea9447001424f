"""Checks of a run's model, tokenizer and adapters before a run; no weights are read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from dist_ft.config.resolved_run import ResolvedRun
from dist_ft.config.schema import ModelSection, RunConfig
from dist_ft.config.sections.prompting import untrainable_problems
from dist_ft.config.sections.task import TaskSection
from dist_ft.config.sections.tuning import PROMPT_METHODS
from dist_ft.config.task_facts import task_class
from dist_ft.core.errors import ModelError


def task_with_any_labels(config: RunConfig) -> TaskSection:
    """Return the model's task with labels; if none are named, two that fit any model."""
    task = config.model_task
    if not task_class(task.name).has_labels or (task.labels and not task.grow_head):
        return task
    return task.model_copy(update={"labels": ("0", "1"), "new_head": True, "grow_head": False})


def check_model(config: RunConfig, model: ModelSection) -> Iterator[str]:
    """Yield a line if the model's config.json cannot be read, or does not fit the run."""
    from dist_ft.model.heads import length_error
    from dist_ft.model.loading.load import read_config

    model_config = read_config(model, config.data.cache_dir, task_with_any_labels(config))
    if getattr(model_config, "quantization_config", None):
        yield (
            f"model.path={model.path}: has int8 weights, which cannot be fine-tuned. A model with "
            "float weights is needed. Export the run without --int8."
        )

    # Virtual tokens take positions of the model too, before those of each sequence.
    num_virtual = config.tuning.prompt.tokens if config.tuning.method in PROMPT_METHODS else 0
    error = length_error(model_config, config.batch.sequence_length, model.path, num_virtual)
    if error:
        yield error


def check_model_files(config: RunConfig, model: ModelSection) -> Iterator[str]:
    """Raise if files of a local model lead out of its folder, or an adapter's info is damaged."""
    from dist_ft.model.loading.check_files import check_files
    from dist_ft.model.loading.load import read_config

    try:
        read_config(model, config.data.cache_dir, task_with_any_labels(config))
    except ModelError:
        return  # `check_model` reports it
    check_files(model)
    yield from ()


def check_tuning(config: RunConfig, model: ModelSection) -> Iterator[str]:
    """Raise if `tuning` or `optimizer` names modules or weights that the model lacks."""
    # By default no name is given, and building the model takes seconds.
    if config.tuning == type(config.tuning)() and not config.optimizer.decay_exempt:
        return

    import torch

    from dist_ft.engine import optimizers
    from dist_ft.model.adapters import tuning
    from dist_ft.model.loading.load import build_uninitialized_model, read_config

    task = task_with_any_labels(config)
    try:
        read_config(model, config.data.cache_dir, task)
    except ModelError:
        return  # `check_model` reports it

    # On the meta device tensors have a shape but no values: any model fits into memory.
    with torch.device("meta"):
        network = build_uninitialized_model(model, config.data.cache_dir, task)
        tuning.apply_tuning(network, config.tuning, config.run.seed, config.model_task)
        trainable = {name: p for name, p in network.named_parameters() if p.requires_grad}
        optimizers.param_groups(trainable, 0.0, exempt=config.optimizer.decay_exempt)

    yield from ()


def check_prompting(config: RunConfig) -> Iterator[str]:
    """Yield a line if the prompting method cannot be trained.

    Raise if two labels have the same words.
    """
    yield from untrainable_problems(config.prompting)

    # Labels that are found in the data are not known yet, and then neither are their words.
    labels = config.task.labels or tuple(config.prompting.verbalizers)
    if config.prompting.method != "likelihood" or not labels:
        return

    from dist_ft.model.loading.load import load_tokenizer
    from dist_ft.runtime.bootstrap.build_model import build_prompt_encoder

    try:
        tokenizer = load_tokenizer(config.model, config.data.cache_dir)
    except ModelError:
        return  # `check_tokenizer` reports it

    run = replace(ResolvedRun.from_config(config), labels=labels, tokenizer=tokenizer)
    build_prompt_encoder(run).label_words()


def check_tokenizer(config: RunConfig, model: ModelSection) -> Iterator[str]:
    """Raise if the tokenizer cannot be loaded."""
    from dist_ft.model.loading.load import load_tokenizer, read_config

    try:
        load_tokenizer(model, config.data.cache_dir)
    except ModelError:
        if model.tokenizer is None:
            try:
                read_config(model, config.data.cache_dir, task_with_any_labels(config))
            except ModelError:
                return  # the model itself is missing: `check_model` reports it once
        raise
    yield from ()
