"""From a config to a `ResolvedRun`: the only place that fills in what a config leaves open.

Each step needs the ones before it. What is found on the first start is stored with the run, so that
every later start and every rank finds the same.
"""

from __future__ import annotations

from dist_ft.checkpoint.initial_weights import resolve_initial_model
from dist_ft.config.resolved_run import ResolvedRun
from dist_ft.config.schema import ModelSection, RunConfig
from dist_ft.core.world import Collectives, World
from dist_ft.model.loading.download import cache_folder, fetch_model
from dist_ft.model.loading.grow_head import grow_head
from dist_ft.model.loading.load import load_tokenizer
from dist_ft.runtime.bootstrap.few_shot_examples import resolve_templates
from dist_ft.runtime.bootstrap.labels import resolve_labels
from dist_ft.storage.filesystem import Store


def resolve_run(
    config: RunConfig, store: Store, world: World, collectives: Collectives
) -> ResolvedRun:
    """Return the run with model folder, tokenizer, labels and prompt templates; a collective call.

    Raises:
        CheckpointError: the run that model.path names has no sound checkpoint.
        ModelError: the tokenizer cannot be loaded.
        DataError, ConfigError: see `resolve_labels` and `resolve_templates`.
    """
    model = resolve_initial_model(config, store, world, collectives)

    return resolve_data(config, model, store, world, collectives)


def resolve_data(
    config: RunConfig, model: ModelSection, store: Store, world: World, collectives: Collectives
) -> ResolvedRun:
    """Return the run with a known model folder, and tokenizer, labels and templates.

    A collective call.
    """
    run = ResolvedRun(
        config,
        model,
        labels=config.task.labels,
        tokenizer=load_tokenizer(model, config.data.cache_dir),
    )

    # Labels before templates: the examples in a template show the words of their labels.
    run = resolve_labels(run, store, world, collectives)

    return resolve_templates(run, store, world, collectives)


def resolve_grown_head(run: ResolvedRun) -> ResolvedRun:
    """Return the run with a model that has a row of the head per label, if task.grow_head adds any.

    Not part of `resolve_run`: it downloads the weights, and errors in the data are cheaper to find
    before that.
    """
    config = run.config
    if not config.task.grow_head:
        return run

    folder = fetch_model(run.model.path, run.model.revision, config.data.cache_dir)
    cache = cache_folder(config.data.cache_dir, "models")
    grown = grow_head(folder, run.task, config.run.seed, cache)

    # Without new labels the model keeps its path and revision.
    if grown == folder:
        return run
    return run.with_model_folder(grown)
