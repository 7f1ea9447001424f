"""Scores models as they are on the held-out data of a config: the same metrics as a run's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dist_ft.config.resolved_run import ResolvedRun
from dist_ft.config.schema import RunConfig
from dist_ft.config.task_facts import task_class
from dist_ft.core.errors import ConfigError
from dist_ft.inference import distributed_scoring
from dist_ft.inference.entities import EntityGenerator
from dist_ft.inference.evaluation_run import derive_evaluation_run
from dist_ft.inference.model_under_test import ForwardModel, ModelUnderTest
from dist_ft.inference.robustness import score_with_robustness
from dist_ft.metrics import best
from dist_ft.storage import filesystem


def evaluate_models(
    config: RunConfig,
    paths: list[str],
    random_head: bool = False,
    on_result: Callable[[str, dict[str, Any]], None] = lambda path, metrics: None,
) -> dict[str, dict[str, Any]]:
    """Return {path: metrics on evaluation.data} of the model at each of `paths`, as it is.

    Metrics are numbers by name, and tables by label; `head` is what answered
    (`ModelUnderTest.head`).

    In this process, or, with cluster.workers, on workers that share its weights
    (`distributed_scoring`).

    A model with a head for the task answers by it; any other one as `prompting` says. With several
    templates the metrics are the means, `<metric>_best` and `<metric>_worst` are added, and all of
    them are in `by_template`.

    Args:
        config: task, data and batch; its model is replaced by each of `paths`, except for the
            tokenizer it names.
        paths: folders, URLs, hub names.
        random_head: also score a head that was never trained; otherwise that is an error.
        on_result: called with each model's path and metrics.

    Raises:
        ConfigError: the config has no held-out data.
        ModelError: a model that cannot do the task, or whose head was never trained.
    """
    if not config.evaluation.data:
        raise ConfigError(
            ["evaluation.data: is empty. Held-out data is needed to score models. Set it."],
            "evaluate",
        )

    filesystem.configure(config.storage.options)
    results = {}
    for path in paths:
        run = derive_evaluation_run(config, path)

        # The number of workers is that of the config given: a derived run has none.
        if config.max_workers == 0:
            results[path] = _evaluate(run, random_head)
        else:
            results[path] = distributed_scoring.score(run, config.cluster, random_head)

        on_result(path, results[path])

    return results


def _evaluate(run: ResolvedRun, random_head: bool) -> dict[str, Any]:
    model: ModelUnderTest
    if run.config.prompting.method == "generation":
        model = EntityGenerator(run)
    else:
        model = ForwardModel(run, random_head)

    # The model's own templates have the examples written in: they are what it is prompted with, and
    # those of the config, in the same order, are what is shown.
    templates = model.run.prompting.templates
    if len(templates) <= 1:
        return {**score_with_robustness(model), "head": model.head}

    metrics_by_template = {}
    for shown, template in zip(run.config.prompting.templates, templates, strict=True):
        model.use_template(template)
        metrics_by_template[shown] = score_with_robustness(model)

    metrics = aggregate_templates(run.config.task.name, metrics_by_template)
    return {**metrics, "head": model.head}


def aggregate_templates(
    task: str, metrics_by_template: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """Return mean, best and worst of each metric over templates, and all of them by template."""
    every = list(metrics_by_template.values())

    # Tables by label have no mean; they stay in `by_template`.
    metrics: dict[str, Any] = {}
    for name, value in every[0].items():
        if isinstance(value, float | int):
            metrics[name] = sum(one[name] for one in every) / len(every)

    # A metric may be absent, such as F1 of entities where no label is that of an entity.
    for name in task_class(task).metrics:
        values = [one[name] for one in every if name in one]
        values.sort(key=lambda value: best.sort_key(name, value))
        if values:
            metrics[f"{name}_best"] = values[0]
            metrics[f"{name}_worst"] = values[-1]

    return {**metrics, "by_template": metrics_by_template}
