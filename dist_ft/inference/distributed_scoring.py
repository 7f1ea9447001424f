"""Scores a model on the workers of a cluster, for models that one process cannot hold.

It is an ordinary run of zero steps (`schedule.steps=0`): its metrics are those of the evaluation
before the first step. Its folder is removed once they are read. Guarantees: a head that was never
trained is refused before workers are requested, or reported as random. Prototypes, generated
entities and robustness scores need one process.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
from typing import Any
from uuid import uuid4

from dist_ft.config.resolved_run import ResolvedRun
from dist_ft.config.schema import (
    CheckpointSection,
    ClusterSection,
    EvaluationSection,
    RunConfig,
    ScheduleSection,
)
from dist_ft.config.sections.robustness import RobustnessSection
from dist_ft.config.task_facts import task_class
from dist_ft.core.errors import ConfigError, ModelError
from dist_ft.core.world import World, collectives
from dist_ft.inference.evaluation_run import has_own_head, resolve_answers
from dist_ft.storage import filesystem
from dist_ft.storage.filesystem import Store
from dist_ft.training.evaluation import read_evaluation
from dist_ft.training.metrics_log import read_metrics

NAME_LENGTH = 30
ONE_PROCESS_METHODS = ("prototypes", "generation")


def score(run: ResolvedRun, cluster: ClusterSection, random_head: bool = False) -> dict[str, Any]:
    """Return the metrics of the run's model on evaluation.data, computed by workers of `cluster`.

    `head` is what answered (`ModelUnderTest.head`).

    Raises:
        ConfigError: scores that need one process.
        ModelError: a head that was never trained.
    """
    config = run.config
    _require_distributable(config)

    # Checked here, because training accepts such a head: most runs start with one.
    head = _head(run)
    if head == "random" and not random_head:
        raise ModelError(
            f"model.path={config.model.path}: the files hold no head for task.name="
            f"{config.task.name}, and scores would be random. A trained head is required. Train it "
            "first, or use --random-head."
        )

    # Labels and few-shot examples are found here: the workers get a config without the training
    # data they come from.
    world = World()
    run = resolve_answers(run, world, collectives(world))
    num_templates = len(run.prompting.templates)
    if num_templates > 1:
        raise ConfigError(
            [
                f"prompting.templates: {num_templates} templates are given. Workers score one; "
                "one process (cluster.workers=0) compares several. Give one template."
            ],
            "evaluate",
        )

    metrics = _run_and_read(_derive_zero_step_config(run, cluster))
    return {**metrics, "head": head}


def _require_distributable(config: RunConfig) -> None:
    """Raise ConfigError if the config needs scores that workers do not compute."""
    method = config.prompting.method
    if method in ONE_PROCESS_METHODS:
        raise ConfigError(
            [
                f"prompting.method={method}: needs one process. Workers score a trained head, or "
                "by likelihood. Set cluster.workers=0."
            ],
            "evaluate",
        )

    if config.evaluation.robustness != RobustnessSection():
        raise ConfigError(
            [
                "evaluation.robustness: needs one process. It is allowed with cluster.workers=0. "
                "Set that, or remove the section."
            ],
            "evaluate",
        )


def _head(run: ResolvedRun) -> str:
    """Return the source of the predictions; see `ModelUnderTest.head`."""
    config = run.config
    if config.prompting.method != "none":
        return config.prompting.method

    if task_class(config.task.name).has_head and not has_own_head(run):
        return "random"
    return "trained"


def _derive_zero_step_config(run: ResolvedRun, cluster: ClusterSection) -> RunConfig:
    """Return the config of a run that evaluates and nothing else.

    It holds what is resolved already, because such a run has no training data to find labels and
    examples in.
    """
    config, held_out = run.config, run.config.evaluation.data

    # A name of its own, because the same name would resume the run it belongs to. A name has at
    # most 47 characters (`run.name`), so the run's own is cut.
    short_name = config.run.name[:NAME_LENGTH].rstrip("-")
    name = f"{short_name}-{uuid4().hex[:12]}"

    # Every run evaluates before its first step (`at_start`), with these fields of the config's own.
    evaluation = EvaluationSection(
        data=held_out,
        max_samples=config.evaluation.max_samples,
        decoding=config.evaluation.decoding,
        generate_samples=config.evaluation.generate_samples,
        keep_generations=config.evaluation.keep_generations,
        text_metrics=config.evaluation.text_metrics,
        text_tokenizer=config.evaluation.text_tokenizer,
    )
    return config.model_copy(
        update={
            "run": config.run.model_copy(update={"name": name}),
            "model": run.model,
            "task": run.task,
            "prompting": run.prompting,
            "cluster": cluster,
            # a run must have training data; with zero steps none of it is trained on
            "data": config.data.model_copy(
                update={"train": held_out, "mixing": (), "temperature": None}
            ),
            "schedule": ScheduleSection(steps=0),
            "checkpoint": CheckpointSection(),
            "evaluation": evaluation,
            "log": config.log.model_copy(update={"tensorboard": False}),
        }
    )


def _run_and_read(config: RunConfig) -> dict[str, Any]:
    """Run the config, return the metrics of its evaluation, and remove its folder."""
    from dist_ft.runtime.ray_backend import driver

    store = Store(config.run_url)
    try:
        # stdout is for the result of the command; the output of the run goes to stderr
        with contextlib.redirect_stdout(sys.stderr):
            driver.run(config)

        # With zero steps, no evaluation follows the one before training.
        (line,) = [line for line in read_metrics(store) if line["kind"] == "evaluation"]
        metrics = {}
        for name, value in line.items():
            if name not in ("step", "kind", "time", "attempt"):
                metrics[name] = value

        # Tables, examples and generations are not in the line.
        return metrics | read_evaluation(store, 0)
    finally:
        for path in store.walk(""):
            store.remove(path)
        if filesystem.is_local(store.url):  # local storage also has folders
            shutil.rmtree(filesystem.local_path(store.url), ignore_errors=True)
