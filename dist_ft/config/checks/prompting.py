"""Contradictions between the sections `prompting` and `task`."""

from __future__ import annotations

from collections.abc import Iterator

from dist_ft.config.schema import RunConfig
from dist_ft.config.task_facts import TASKS, task_class


def _task(config: RunConfig) -> Iterator[str]:
    method, task = config.prompting.method, config.task
    if method == "none":
        return

    if method not in task_class(task.name).prompting_methods:
        tasks = [name for name in TASKS if method in task_class(name).prompting_methods]
        yield (
            f"prompting.method={method}: not used by task.name={task.name}. Allowed with "
            f"task.name={' or '.join(tasks)}. Set that, or remove it."
        )

    # Both belong to a head, and a prompted model has none.
    for field in ("focal_gamma", "new_head"):
        if not task.is_default(field):
            yield (
                f"task.{field}: with prompting.method={method} there is no head. Allowed without "
                "prompting. Remove it."
            )


def _templates(config: RunConfig) -> Iterator[str]:
    if config.prompting.method == "none":
        return

    has_pair = config.task.columns.pair is not None
    for number, template in enumerate(config.prompting.templates):
        yield from _template(f"prompting.templates.{number}", template, has_pair)


def _template(path: str, template: str, has_pair: bool) -> Iterator[str]:
    """Yield the problems of one template."""
    # Formatting finds placeholders as the run will see them: "{{text}}" is none, "{text!r}" is one.
    # The NUL stands for a text that is not empty.
    try:
        empty = template.format(text="", pair="")
        with_text = template.format(text="\0", pair="")
        with_pair = template.format(text="", pair="\0")
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        yield (
            f"{path}: not a template ({type(error).__name__}: {error}). Allowed: {{text}} and "
            "{pair}. Double all other braces."
        )
        return

    if with_text == empty:
        yield f"{path}: has no place for the row's text. Needs {{text}}. Add it."
    if has_pair and with_pair == empty:
        yield (
            f"{path}: has no place for the second text (task.columns.pair). Needs {{pair}}. Add it."
        )

    if not has_pair and with_pair != empty:
        yield (
            f"{path}: has a place for a second text, but task.columns.pair is not set. Set it, or "
            "remove {pair}."
        )


def _verbalizers(config: RunConfig) -> Iterator[str]:
    words, labels = config.prompting.verbalizers, config.task.labels
    if config.prompting.method != "likelihood":
        return

    # Without task.labels the labels come from the data, which is not read here.
    unknown = sorted(set(words) - set(labels)) if labels else []
    if unknown:
        yield (
            f"prompting.verbalizers.{unknown[0]}: not a label of task.labels. Allowed: "
            f"{', '.join(labels)}. Correct one of them."
        )

    missing = sorted(set(labels) - set(words)) if words else []
    if missing:
        yield (
            f"prompting.verbalizers: {missing[0]} of task.labels has no words. Allowed: one entry "
            "for each label, or none at all. Add it."
        )


CHECKS = (_task, _templates, _verbalizers)
