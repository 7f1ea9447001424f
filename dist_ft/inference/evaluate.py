"""Models as they are, scored on the held-out data of a config, without training: the same metrics as a run's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dist_ft.checkpoint import initial_weights
from dist_ft.config.schema import RunConfig
from dist_ft.config.sections.task import METRICS
from dist_ft.core.errors import ConfigError
from dist_ft.inference import distributed_scoring
from dist_ft.inference.entities import Written
from dist_ft.inference.model_under_test import Asked, by_head
from dist_ft.inference.robustness import scored
from dist_ft.metrics import best
from dist_ft.storage import filesystem


def evaluate_models(
    config: RunConfig,
    paths: list[str],
    random_head: bool = False,
    told: Callable[[str, dict[str, Any]], None] = lambda path, values: None,
) -> dict[str, dict[str, Any]]:
    """Return the metrics of the model at each of `paths` on evaluation.data, as it is.

    In this process, or, with cluster.workers, on workers that share its weights (`scoring_run`).

    A model with a head for the task is asked by it; another one as `prompting` says. With several templates the metrics
    are the means, `<metric>_best` and `<metric>_worst` stand beside, and all of them in `by_template`.

    Args:
        config: task, data and batch; its model is replaced by each of `paths`, but for the tokenizer it names.
        paths: folders, URLs, hub names.
        random_head: score a head that was never trained too; else that is an error.
        told: called with each model's path and metrics.

    Raises:
        ConfigError: there is no held-out data.
        ModelError: a model that can not do the task, or whose head was never trained.
    """
    if not config.evaluation.data:
        raise ConfigError(
            ["evaluation.data: is empty; what to score on is needed; set it"], "evaluate"
        )
    filesystem.configure(config.storage.options)
    found = {}
    for path in paths:
        here = of_model(config, path)
        found[path] = (
            _evaluate(here, random_head)
            if config.max_workers == 0
            else distributed_scoring.score(
                here.model_copy(update={"cluster": config.cluster}), random_head
            )
        )
        told(path, found[path])
    return found


def of_model(config: RunConfig, path: str) -> RunConfig:
    """Return the config with another model, in this process and all of its weights as they lie in the files."""
    changes: dict[str, Any] = {
        "cluster": config.cluster.model_copy(update={"workers": 0}),
        "tuning": type(config.tuning)(),
        "task": config.task.model_copy(update={"new_head": False, "grow_head": False}),
    }
    model = config.model
    if path != config.model.path:
        model = config.model.model_copy(update={"path": path, "revision": None})
    changes["model"] = initial_weights.resolve_model_section(model, config.data.cache_dir)
    return by_head(config.model_copy(update=changes))


def _evaluate(config: RunConfig, random_head: bool) -> dict[str, Any]:
    asked: Any = (
        Written(config) if config.prompting.method == "generation" else Asked(config, random_head)
    )
    templates = asked.config.prompting.templates
    found = []
    for template in templates or ("",):
        if len(templates) > 1:
            asked.by_template(template)
        found.append(scored(asked, config))
    named = dict(zip(config.prompting.templates, found, strict=True)) if len(templates) > 1 else {}
    return {**(over_templates(config.task.name, named) if named else found[0]), "head": asked.kind}


def over_templates(task: str, found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return means of the numbers of several templates, the best and the worst of each metric, and all of them."""
    every = list(found.values())
    numbers = [name for name, value in every[0].items() if isinstance(value, float | int)]
    values: dict[str, Any] = {
        name: sum(one[name] for one in every) / len(every) for name in numbers
    }
    for name in METRICS[task]:
        own = [one[name] for one in every if name in one]
        own.sort(key=lambda value: best.sort_key(name, value))
        if own:
            values[f"{name}_best"], values[f"{name}_worst"] = own[0], own[-1]
    return {**values, "by_template": found}
