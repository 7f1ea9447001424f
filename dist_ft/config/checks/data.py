"""Contradictions between the sections `data` and `task`."""

from __future__ import annotations

from collections.abc import Iterator

from dist_ft.config.schema import RunConfig

SPLITTING_TASKS = ("masked_lm", "question_answering")
"""Tasks for which a long row can be split into several sequences."""
AUGMENTED_TASKS = (
    "sequence_classification",
    "multi_label",
    "regression",
    "token_classification",
)
"""Tasks that allow augmentation: their labels belong to words, or to whole texts."""


def _split(config: RunConfig) -> Iterator[str]:
    is_split = config.data.overlong == "split" and config.data.format != "text"
    if is_split and config.task.name not in SPLITTING_TASKS:
        yield (
            "data.overlong=split: only plain text can be split "
            f"(data.format={config.data.format}). Allowed: error, truncate, drop. Use one of "
            "those, or set data.format=text."
        )


def _format(config: RunConfig) -> Iterator[str]:
    data = config.data
    has_format = data.format != "auto" or data.fields != type(data.fields)()
    if config.task.name != "causal_lm" and has_format:
        yield (
            f"data.format={data.format}: task.name={config.task.name} reads the columns of "
            "task.columns. Allowed with task.name=causal_lm. Remove it and data.fields."
        )


def _augment(config: RunConfig) -> Iterator[str]:
    augment, task = config.data.augment, config.task.name
    if augment == type(augment)():
        return
    if task not in AUGMENTED_TASKS:
        yield (
            f"data.augment: not used by task.name={task} (its targets are tokens or positions of "
            f"the texts themselves). Allowed with {', '.join(AUGMENTED_TASKS)}. Remove it."
        )
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
