"""Contradictions between the section `tuning` and other sections."""

from __future__ import annotations

from collections.abc import Iterator

from dist_ft.config.schema import RunConfig
from dist_ft.config.sections.tuning import PROMPT_METHODS
from dist_ft.config.task_facts import task_class


def _nvme(config: RunConfig) -> Iterator[str]:
    tuning, zero = config.tuning, config.zero
    if zero.offload_param == "nvme" and (tuning.method != "full" or tuning.frozen):
        yield (
            "zero.offload_param=nvme: frozen weights (section tuning) cannot be read back from "
            "nvme. Allowed if all weights are trained. Set zero.offload_param=cpu."
        )

    # Initial weights, Fisher information and the average are state of our own, which DeepSpeed's
    # swapping of optimizer state does not know.
    if zero.offload_optimizer == "nvme" and (tuning.anchor.method != "none" or tuning.ema_decay):
        yield (
            "zero.offload_optimizer=nvme: the state of tuning.anchor and tuning.ema_decay cannot "
            "be offloaded to nvme. Allowed: cpu or none. Set one, or remove those."
        )


def _is_plain_likelihood(config: RunConfig) -> bool:
    return config.prompting.method == "none" and config.task.objective == "likelihood"


def _prompts(config: RunConfig) -> Iterator[str]:
    tuning = config.tuning
    if tuning.method not in PROMPT_METHODS:
        return

    method = f"tuning.method={tuning.method}"
    task = config.task.name
    if task_class(task).virtual_token_type is None:
        yield (
            f"{method}: peft has no virtual tokens for task.name={task}. Allowed with other tasks. "
            "Set tuning.method=lora."
        )

    if not _is_plain_likelihood(config):
        yield (
            f"{method}: virtual tokens are trained by likelihood only. Allowed with "
            "prompting.method=none and task.objective=likelihood. Set those, or tuning.method=lora."
        )


def _prefix(config: RunConfig) -> Iterator[str]:
    method = "tuning.method=prefix_tuning"
    model = config.model
    if config.tuning.method != "prefix_tuning":
        return

    # effective_data, as tasks with padded batches do not pack, whatever data.pack says.
    if config.effective_data.pack:
        yield (
            f"{method}: samples packed into one sequence would share one prefix. Allowed with "
            "data.pack=false. Set that, or tuning.method=prompt_tuning."
        )

    if model.activation_checkpointing or model.attention.startswith("flash"):
        yield (
            f"{method}: the prefix is in the key-value cache, which model.activation_checkpointing "
            "and flash attention do not use. Allowed with sdpa and eager. Set "
            "model.attention=sdpa, model.activation_checkpointing=false."
        )


def _adalora(config: RunConfig) -> Iterator[str]:
    if config.tuning.method != "adalora":
        return

    if not _is_plain_likelihood(config):
        yield (
            "tuning.method=adalora: its penalty is for training by likelihood only. Allowed with "
            "prompting.method=none and task.objective=likelihood. Set those, or tuning.method=lora."
        )

    # Importance is weight times gradient, element by element, of each whole matrix.
    if config.max_workers and config.zero.stage:
        yield (
            f"zero.stage={config.zero.stage}: tuning.method=adalora needs whole gradients, which "
            "ZeRO-1 to 3 partition. Allowed with zero.stage=0 and in one process. Set "
            "zero.stage=0, or tuning.method=lora."
        )

    # With another type the engine steps float32 copies, and gradients of the weights are 16-bit.
    if config.model.dtype != "float32":
        yield (
            f"model.dtype={config.model.dtype}: tuning.method=adalora needs float32 gradients of "
            "the weights themselves. Allowed: float32. Set that, or tuning.method=lora."
        )


def _own_texts(config: RunConfig) -> Iterator[str]:
    """Adversarial training and augmentation need training on a row's own texts and labels."""
    if config.task.objective == "minimum_risk":
        conflict = "task.objective=minimum_risk"
    elif config.prompting.method != "none":
        conflict = f"prompting.method={config.prompting.method}"
    else:
        return

    if config.tuning.adversarial.method != "none":
        yield (
            f"tuning.adversarial.method={config.tuning.adversarial.method}: conflicts with "
            f"{conflict}, whose model input is not the data's text alone. Allowed without it. "
            "Remove one."
        )

    if config.data.augment != type(config.data.augment)():
        yield (
            f"data.augment: conflicts with {conflict}, whose texts also have other words. Allowed "
            "without it. Remove one."
        )


CHECKS = (_nvme, _prompts, _prefix, _adalora, _own_texts)
