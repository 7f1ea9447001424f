"""Contradictions about what keeps a run from learning by heart and from forgetting."""

from __future__ import annotations

from collections.abc import Iterator

from dist_ft.config.schema import RunConfig

ADDED = ("lora", "ia3")
"""Methods of tuning whose weights are new."""
AUGMENTED = ("sequence_classification", "multi_label", "regression", "token_classification")
"""Tasks whose texts may be augmented: their labels are those of words, or of whole texts."""


def _adversarial(config: RunConfig) -> Iterator[str]:
    section = config.tuning.adversarial
    both, alone = ("epsilon", "weight"), ("steps", "step_size")
    used = {"none": (), "fgm": both, "pgd": (*both, *alone)}[section.method]
    for field in (*both, *alone):
        value = getattr(section, field)
        if field not in used and value != type(section).model_fields[field].default:
            yield (
                f"tuning.adversarial.{field}={value}: tuning.adversarial.method={section.method} does not use it; "
                f"{'pgd does' if section.method == 'fgm' else 'fgm or pgd do'}; set that method, or remove it"
            )
    if section.method == "pgd" and section.steps * section.step_size < section.epsilon:
        yield (
            f"tuning.adversarial.epsilon={section.epsilon}: {section.steps} steps of step_size={section.step_size} "
            f"do not reach so far; at most {section.steps * section.step_size:g} is allowed; take more or longer "
            f"steps, or lower epsilon"
        )


def _unfit(config: RunConfig) -> Iterator[str]:
    """What is learned in another way than from the texts of a row and their labels."""
    other = (
        "task.objective=minimum_risk"
        if config.task.objective == "minimum_risk"
        else f"prompting.method={config.prompting.method}"
        if config.prompting.method != "none"
        else ""
    )
    if other and config.tuning.adversarial.method != "none":
        yield (
            f"tuning.adversarial.method={config.tuning.adversarial.method}: does not go with {other}, which asks "
            f"the model of other texts than the data's; allowed without; remove one"
        )
    if other and config.data.augment != type(config.data.augment)():
        yield f"data.augment: does not go with {other}, whose texts hold other words too; allowed without; remove one"


def _augment(config: RunConfig) -> Iterator[str]:
    section, task = config.data.augment, config.task.name
    if section == type(section)():
        return
    changes = section.replace or section.swap or section.delete
    if task not in AUGMENTED:
        yield (
            f"data.augment: task.name={task} does not use it (what is learned there are tokens, or places, of the "
            f"texts themselves); allowed with {', '.join(AUGMENTED)}; remove it"
        )
    if bool(section.replace) != bool(section.synonyms):
        yield (
            f"data.augment.replace={section.replace}: data.augment.synonyms is {section.synonyms or 'not set'}; "
            f"both or neither are allowed; set the other, or remove it"
        )
    if not changes:
        yield (
            "data.augment: it does not say what is done to words; needs replace, swap or delete; set one, or remove "
            "it"
        )


def _anchor(config: RunConfig) -> Iterator[str]:
    tuning, section = config.tuning, config.tuning.anchor
    if (section.method == "none") != (section.strength == 0):
        yield (
            f"tuning.anchor.strength={section.strength:g}: tuning.anchor.method is {section.method}; l2 or ewc with "
            f"a strength above 0, or neither, are allowed; set the other, or remove it"
        )
    if (section.method == "ewc") != bool(section.data):
        yield (
            f"tuning.anchor.data: {'is not set' if not section.data else 'is set'} with tuning.anchor.method="
            f"{section.method}; ewc, and only ewc, needs it; {'set it' if not section.data else 'remove it'}, or "
            f"change the method"
        )
    if section.max_samples and section.method != "ewc":
        yield (
            f"tuning.anchor.max_samples={section.max_samples}: tuning.anchor.method={section.method} does not use "
            f"it; ewc does; remove it"
        )
    if section.method != "none" and tuning.method in ADDED and not tuning.trainable:
        yield (
            f"tuning.anchor.method={section.method}: with tuning.method={tuning.method} only added weights learn, "
            f"and they have nothing to go back to; allowed with full, partial, or tuning.trainable; remove it"
        )
    if config.zero.offload_optimizer == "nvme" and (section.method != "none" or tuning.ema_decay):
        yield (
            "zero.offload_optimizer=nvme: the state of tuning.anchor and tuning.ema_decay can not lie there; "
            "allowed is cpu or none; set one, or remove those"
        )


def _average(config: RunConfig) -> Iterator[str]:
    if config.evaluation.weights == "ema" and not config.tuning.ema_decay:
        yield (
            "evaluation.weights=ema: no average of the weights is kept; needs tuning.ema_decay above 0 (0.99, 0.999); "
            "set it, or remove evaluation.weights"
        )


CHECKS = (_adversarial, _unfit, _augment, _anchor, _average)
"""Each from a config to a line for each contradiction."""
