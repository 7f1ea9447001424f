"""The run that evaluates a model as it is: a derived config, and the labels of the answers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from uuid import uuid4

from dist_ft.checkpoint import initial_weights
from dist_ft.config.resolved_run import ResolvedRun
from dist_ft.config.schema import RunConfig
from dist_ft.config.sections.prompting import PromptingSection
from dist_ft.config.task_facts import task_class
from dist_ft.core.errors import ModelError
from dist_ft.core.world import Collectives, World
from dist_ft.runtime.bootstrap.few_shot_examples import resolve_templates
from dist_ft.runtime.bootstrap.labels import resolve_labels
from dist_ft.storage.filesystem import Store


def derive_evaluation_run(config: RunConfig, path: str) -> ResolvedRun:
    """Return the run that evaluates the model at `path` in one process, its weights unchanged.

    A model whose files hold a head for the task answers by it, without prompting. The labels are
    not resolved yet.
    """
    # A revision names a commit of the config's own model.
    model = config.model
    if path != model.path:
        model = model.model_copy(update={"path": path, "revision": None})

    # Without the settings of training: adapters and new heads would change the model.
    derived = config.model_copy(
        update={
            "model": model,
            "cluster": config.cluster.model_copy(update={"workers": 0}),
            "tuning": type(config.tuning)(),
            "task": config.task.model_copy(update={"new_head": False, "grow_head": False}),
        }
    )
    folder = initial_weights.resolve_model_section(model, config.data.cache_dir)
    run = replace(ResolvedRun.from_config(derived), model=folder)

    # One config serves models with a head and models that are prompted, side by side.
    if derived.prompting.method != "none" and has_own_head(run):
        without = derived.model_copy(update={"prompting": PromptingSection()})
        return replace(run, config=without)

    return run


def resolve_answers(run: ResolvedRun, world: World, collectives: Collectives) -> ResolvedRun:
    """Return the run with labels (the model's own, if it has a head for some) and prompt templates.

    A collective call.

    A prompted model is never offered the label of rows that are out of scope.
    """
    config = run.config
    is_prompted = config.prompting.method != "none"

    # A head's labels are those of its outputs, in their order; labels found in data may have
    # another order, or lack some.
    if task_class(config.task.name).has_labels and not is_prompted and not run.labels:
        label_by_output = _model_config(run).id2label or {}
        own_labels = tuple(label_by_output[output] for output in sorted(label_by_output))
        if has_own_head(run) and len(own_labels) > 1:
            run = replace(run, labels=own_labels)

    # Labels and templates that a run would store are kept in memory: there is no run.
    store = Store(f"memory://evaluate-{uuid4().hex}")
    run = resolve_labels(run, store, world, collectives)

    out_of_scope = config.evaluation.robustness.out_of_scope_label
    if is_prompted and out_of_scope in run.labels:  # found in the training data
        in_scope = tuple(label for label in run.labels if label != out_of_scope)
        run = replace(run, labels=in_scope)

    return resolve_templates(run, store, world, collectives)


def has_own_head(run: ResolvedRun) -> bool:
    """Return whether the files of the run's model hold a head for its task."""
    from dist_ft.model import heads

    return heads.has_head(_model_config(run), run.task)


def _model_config(run: ResolvedRun) -> Any:
    """Return the config.json of the run's model, whatever its task."""
    from dist_ft.model.loading.download import fetch_model
    from dist_ft.pretrained import pretrained_model

    # Without the weights, so that a model that cannot do the task is refused before they are
    # downloaded.
    model = run.model
    folder = fetch_model(model.path, model.revision, run.config.data.cache_dir, weights=False)
    source = pretrained_model.Source(folder, f"model.path={model.path}", model.trust_remote_code)
    try:
        return pretrained_model.read_config(source)
    except ModelError as error:
        needed = "A folder that save_pretrained or `dist-ft export` writes"
        raise pretrained_model.not_a_model_error(error, source.shown, needed) from error
