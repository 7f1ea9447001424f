"""A model scored by the workers of a cluster, its weights sharded over them: for what one process could not hold.

It is an ordinary run of no step (`schedule.steps=0`): what an evaluation before the first step tells. Its folder goes
when it is read. Guarantees: a head that was never trained is refused before workers are asked for, or said to be
random. Prototypes, entities a model writes and robustness scores are asked for in one process only.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from typing import Any
from uuid import uuid4

from dist_ft.checkpoint import initial_weights
from dist_ft.config.schema import CheckpointSection, EvaluationSection, RunConfig, ScheduleSection
from dist_ft.config.sections.robustness import RobustnessSection
from dist_ft.core.errors import ConfigError, ModelError
from dist_ft.core.world import World, collectives
from dist_ft.inference.model_under_test import has_own_head, labelled
from dist_ft.storage import filesystem
from dist_ft.storage.filesystem import Store
from dist_ft.training.evaluation import FOLDER
from dist_ft.training.metrics_log import read_metrics

NAME_LENGTH = 30
ONE_PROCESS = ("prototypes", "generation")


def score(config: RunConfig, random_head: bool = False) -> dict[str, Any]:
    """Return the metrics of the config's model on evaluation.data, told by its workers; `head` says what answered.

    Raises ConfigError for what one process alone can be asked, ModelError for a head that was never trained.
    """
    _require_sharded(config)
    kind = _kind(config)
    if kind == "random" and not random_head:
        raise ModelError(
            f"model.path={config.model.path}: its files hold no head for task.name={config.task.name}; "
            "its scores would be random; train it first, or ask for them with --random-head"
        )
    world = World()
    config = labelled(config, world, collectives(world))
    templates = config.prompting.templates or ("",)
    if len(templates) > 1:
        raise ConfigError(
            [
                f"prompting.templates: {len(templates)} are given, and workers ask by one; several are "
                "compared in one process (cluster.workers=0); name one"
            ],
            "evaluate",
        )
    return {**_told(_of_no_step(config)), "head": kind}


def _require_sharded(config: RunConfig) -> None:
    section = config.prompting.method
    if section in ONE_PROCESS:
        raise ConfigError(
            [
                f"prompting.method={section}: one process is asked; allowed on workers: a trained head, and "
                "likelihood; set cluster.workers=0"
            ],
            "evaluate",
        )
    if config.evaluation.robustness != RobustnessSection():
        raise ConfigError(
            [
                "evaluation.robustness: one process is asked; allowed with cluster.workers=0; set that, or "
                "remove the section"
            ],
            "evaluate",
        )


def _kind(config: RunConfig) -> str:
    from dist_ft.model.heads import TASKS_WITH_HEAD

    if config.prompting.method != "none":
        return config.prompting.method
    return "random" if config.task.name in TASKS_WITH_HEAD and not has_own_head(config) else "trained"


def _of_no_step(config: RunConfig) -> RunConfig:
    """Return the run that evaluates, and nothing else; of the training data it needs none."""
    evaluation, held_out = config.evaluation, config.evaluation.data
    name = f"{config.run.name[:NAME_LENGTH].rstrip('-')}-{uuid4().hex[:12]}"
    return config.model_copy(
        update={
            "run": config.run.model_copy(update={"name": name}),
            "data": config.data.model_copy(
                update={"train": held_out, "mixing": (), "temperature": None}
            ),
            "schedule": ScheduleSection(steps=0),
            "checkpoint": CheckpointSection(),
            "evaluation": EvaluationSection(
                data=held_out,
                max_samples=evaluation.max_samples,
                decoding=evaluation.decoding,
                generate_samples=evaluation.generate_samples,
                keep_generations=evaluation.keep_generations,
                text_metrics=evaluation.text_metrics,
                text_tokenizer=evaluation.text_tokenizer,
            ),
            "log": config.log.model_copy(update={"tensorboard": False}),
        }
    )


def _told(config: RunConfig) -> dict[str, Any]:
    """Run it, and return what its evaluation told."""
    from dist_ft.runtime.ray_backend import driver

    config = config.model_copy(
        update={"model": initial_weights.resolve_model_section(config.model, config.data.cache_dir)}
    )
    store = Store(config.run_url)
    try:
        with contextlib.redirect_stdout(
            sys.stderr
        ):  # what a run says goes beside what it was asked for
            driver.run(config)
        (line,) = [line for line in read_metrics(store) if line["kind"] == "evaluation"]
        numbers = {
            name: value
            for name, value in line.items()
            if name not in ("step", "kind", "time", "attempt")
        }
        tables = f"{FOLDER}/step-{0:09d}.json"
        return {**numbers, **(json.loads(store.read(tables)) if store.exists(tables) else {})}
    finally:
        for path in store.walk(""):
            store.remove(path)
        if filesystem.is_local(store.url):  # folders exist there
            shutil.rmtree(filesystem.local_path(store.url), ignore_errors=True)
