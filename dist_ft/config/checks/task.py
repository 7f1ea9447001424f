"""Contradictions between the section `task` and other sections."""

from __future__ import annotations

from collections.abc import Iterator

from dist_ft.config.schema import RunConfig
from dist_ft.config.task_facts import task_class, tasks_where


def _regularizers(config: RunConfig) -> Iterator[str]:
    task = config.task.name
    tuning = config.tuning
    facts = task_class(task)
    if tuning.neftune_alpha and not facts.allows_noise:
        yield (
            f"tuning.neftune_alpha={tuning.neftune_alpha}: not used by task.name={task}. Allowed "
            f"with {', '.join(tasks_where(allows_noise=True))}. Remove it."
        )

    if tuning.label_smoothing and not facts.has_probabilities:
        tasks = ", ".join(tasks_where(has_probabilities=True))
        yield (
            f"tuning.label_smoothing={tuning.label_smoothing}: the loss of task.name={task} has no "
            f"label probabilities to smooth. Allowed with {tasks}. Remove it."
        )


def _minimum_risk(config: RunConfig) -> Iterator[str]:
    task = config.task
    if task.objective != "minimum_risk":
        return

    if not task_class(task.name).generates_text:
        yield (
            f"task.objective=minimum_risk: models of task.name={task.name} generate no text. "
            f"Allowed with {' and '.join(tasks_where(generates_text=True))}. Remove it."
        )

    # The objective is a risk of whole texts, so there is no target distribution to smooth.
    if config.tuning.label_smoothing:
        yield (
            f"tuning.label_smoothing={config.tuning.label_smoothing}: not used by "
            "task.objective=minimum_risk. Allowed with likelihood. Remove it."
        )


def _own_checks(config: RunConfig) -> Iterator[str]:
    # Here, too, a user's own task adds its checks.
    yield from task_class(config.task.name).check(config)


CHECKS = (_regularizers, _minimum_risk, _own_checks)
