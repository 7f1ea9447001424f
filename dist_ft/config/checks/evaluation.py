"""Contradictions between the section `evaluation` and other sections."""

from __future__ import annotations

from collections.abc import Iterator

from dist_ft.config.schema import RunConfig
from dist_ft.config.task_facts import task_class, tasks_where


def _best_checkpoints(config: RunConfig) -> Iterator[str]:
    evaluation, checkpoint = config.evaluation, config.checkpoint
    if not checkpoint.keep_best:
        return

    # Which steps end an epoch depends on the data, which is not read here.
    if evaluation.every_epochs and evaluation.data:
        return

    # A checkpoint without an evaluation of its own step has no rank. With "auto" the interval
    # changes during the run, so nothing can be said of its steps.
    save_steps = checkpoint.every_steps
    evaluation_steps = evaluation.every_steps
    is_evaluated_when_saved = (
        bool(evaluation.data)
        and bool(evaluation_steps)
        and save_steps not in (0, "auto")
        and int(save_steps) % evaluation_steps == 0
    )
    if not is_evaluated_when_saved:
        yield (
            f"checkpoint.keep_best={checkpoint.keep_best}: needs an evaluation at every "
            f"checkpoint. Allowed with evaluation.data and a checkpoint.every_steps ({save_steps}) "
            f"that is a multiple of evaluation.every_steps ({evaluation_steps}). Set them "
            "accordingly."
        )


def _epochs(config: RunConfig) -> Iterator[str]:
    # Weighted sources are drawn without end, each at its own pace: no step ends an epoch of all.
    data = config.data
    has_weight = any(source.weight is not None for source in data.train)
    is_weighted = bool(data.mixing) or data.temperature is not None or has_weight
    if config.evaluation.every_epochs and is_weighted:
        yield (
            f"evaluation.every_epochs={config.evaluation.every_epochs}: sources that are sampled "
            "by weight have no epochs. Allowed without weight, temperature and mixing. Use "
            "evaluation.every_steps."
        )


def _best_by(config: RunConfig) -> Iterator[str]:
    evaluation, task = config.evaluation, config.task.name
    metrics = ["loss", *task_class(task).metrics]

    # Metrics of generated text exist only if text is generated.
    if evaluation.decoding.max_new_tokens:
        metrics += evaluation.text_metrics
    if config.checkpoint.best_by not in metrics:
        yield (
            f"checkpoint.best_by={config.checkpoint.best_by}: not a metric of evaluations of "
            f"task.name={task}. Allowed: {', '.join(metrics)}. Use one of them."
        )


def _average(config: RunConfig) -> Iterator[str]:
    if config.evaluation.weights == "ema" and not config.tuning.ema_decay:
        yield (
            "evaluation.weights=ema: the run has no average of the weights. Needs tuning.ema_decay "
            "above 0 (0.99, 0.999). Set it, or remove evaluation.weights."
        )


def _generative_task(config: RunConfig) -> Iterator[str]:
    max_new_tokens = config.evaluation.decoding.max_new_tokens
    if max_new_tokens and not task_class(config.task.name).generates_text:
        yield (
            f"evaluation.decoding.max_new_tokens={max_new_tokens}: models of "
            f"task.name={config.task.name} generate no text. Allowed with "
            f"{' and '.join(tasks_where(generates_text=True))}. Set it to 0."
        )


def _robustness(config: RunConfig) -> Iterator[str]:
    section, task = config.evaluation.robustness, config.task
    facts, path = task_class(task.name), "evaluation.robustness"
    if section.typo_rate and not facts.allows_typos:
        yield (
            f"{path}.typo_rate={section.typo_rate}: not used by task.name={task.name}. Allowed "
            f"with {', '.join(tasks_where(allows_typos=True))}. Remove it."
        )

    if section.swaps and not facts.has_labels:
        yield (
            f"{path}.swaps={section.swaps}: not used by task.name={task.name}. Allowed with "
            f"{', '.join(tasks_where(has_labels=True))}. Remove it."
        )

    for field in ("out_of_scope_label", "out_of_scope"):
        if getattr(section, field) and not facts.has_label_per_row:
            yield (
                f"{path}.{field}: not used by task.name={task.name}. Allowed with "
                f"{', '.join(tasks_where(has_label_per_row=True))}. Remove it."
            )

    if section.out_of_scope_label is not None and section.out_of_scope_label in task.labels:
        yield (
            f"{path}.out_of_scope_label={section.out_of_scope_label}: is one of task.labels, so "
            "its rows are in scope. Allowed: another label. Remove it from one of them."
        )


CHECKS = (_best_checkpoints, _epochs, _best_by, _average, _generative_task, _robustness)
