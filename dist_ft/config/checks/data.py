"""Contradictions between the sections `data` and `task`."""

from __future__ import annotations

from collections.abc import Iterator

from dist_ft.config.schema import RunConfig
from dist_ft.config.task_facts import task_class, tasks_where


def _split(config: RunConfig) -> Iterator[str]:
    # A chat or an answer cut in two would have a part without its prompt.
    is_split = config.data.overlong == "split" and config.data.format != "text"
    if is_split and not task_class(config.task.name).splits_rows:
        yield (
            "data.overlong=split: only plain text can be split "
            f"(data.format={config.data.format}). Allowed: error, truncate, drop. Use one of "
            "those, or set data.format=text."
        )


def _format(config: RunConfig) -> Iterator[str]:
    # Only settings that differ from the defaults are refused: a stored config lists all fields.
    data = config.data
    has_format = data.format != "auto" or data.fields != type(data.fields)()
    if has_format and not task_class(config.task.name).reads_formats:
        yield (
            f"data.format={data.format}: task.name={config.task.name} reads the columns of "
            "task.columns. Allowed with task.name=causal_lm. Remove it and data.fields."
        )


def _augment(config: RunConfig) -> Iterator[str]:
    augment, task = config.data.augment, config.task.name
    if augment == type(augment)():
        return

    if not task_class(task).allows_augmentation:
        tasks = ", ".join(tasks_where(allows_augmentation=True))
        yield (
            f"data.augment: not used by task.name={task} (its targets are tokens or positions of "
            f"the texts themselves). Allowed with {tasks}. Remove it."
        )

    # Words can only be replaced by synonyms, and synonyms serve nothing else.
    if bool(augment.replace) != bool(augment.synonyms):
        yield (
            f"data.augment.replace={augment.replace}: data.augment.synonyms is "
            f"{augment.synonyms or 'not set'}. Allowed: both or neither. Set the other, or remove "
            "it."
        )

    if not (augment.replace or augment.swap or augment.delete):
        yield (
            "data.augment: no change of words is set. Needs replace, swap or delete. Set one, or "
            "remove it."
        )


CHECKS = (_split, _format, _augment)
