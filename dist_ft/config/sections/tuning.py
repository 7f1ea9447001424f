"""The section `tuning`: which weights are trained, and regularization."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from dist_ft.config.sections.adapters import (
    ADAPTER_METHODS,
    MERGEABLE_METHODS,
    PROMPT_METHODS,
    AdaloraSection,
    BottleneckSection,
    LoraSection,
    Method,
    Patterns,
    PromptSection,
)
from dist_ft.config.sections.data import Sources
from dist_ft.config.sections.section import Identity, Section

__all__ = [
    "ADAPTER_METHODS",
    "MERGEABLE_METHODS",
    "PROMPT_METHODS",
    "AdaloraSection",
    "AdversarialSection",
    "AnchorSection",
    "BottleneckSection",
    "LoraSection",
    "Method",
    "Patterns",
    "PromptSection",
    "TuningSection",
]


class AdversarialSection(Section):
    """Also train on input embeddings that are perturbed to increase the loss."""

    method: Literal["none", "fgm", "pgd"] = Field(
        "none",
        description=(
            "fgm: one step along the gradient (arXiv:1605.07725), about twice the compute; pgd: "
            "several steps, each projected onto the ball of epsilon (arXiv:1706.06083), about 1 + "
            "steps times the compute; none: no adversarial training."
        ),
    )
    epsilon: float = Field(
        1.0,
        gt=0,
        description="Limit of the perturbation of a sample's embeddings (L2 norm of all).",
    )
    steps: int = Field(3, ge=1, description="pgd: steps along the gradient.")
    step_size: float = Field(0.4, gt=0, description="pgd: length of a step (L2 norm).")
    weight: float = Field(
        1.0, gt=0, description="Weight of the adversarial loss; the plain loss has weight 1."
    )


class AnchorSection(Section):
    """Pull towards the initial weights of the run."""

    method: Literal["none", "l2", "ewc"] = Identity(
        "none",
        description=(
            "l2: all weights alike (L2-SP, arXiv:1802.01483); ewc: each by its Fisher information "
            "on `data` (elastic weight consolidation, arXiv:1612.00796); none: no pull."
        ),
    )
    # Not part of the identity: the initial weights are stored, so a resume may pull harder or less.
    strength: float = Field(
        0.0,
        ge=0,
        description=(
            "Each step moves a weight towards its initial value by about the learning rate times "
            "this (ewc: times its Fisher information) times the distance; decoupled from the "
            "gradient, like weight decay."
        ),
    )
    data: Sources = Field(
        (),
        description=(
            "ewc: data of the abilities to preserve, in the format of the training data; read "
            "once, before the first step."
        ),
    )
    max_samples: int = Field(0, ge=0, description="ewc: number of samples of `data`; 0: all.")


class TuningSection(Section):
    """Which weights are trained, and regularization against overfitting and forgetting.

    Frozen weights need no optimizer memory and are written to checkpoints once.
    """

    method: Method = Identity(
        "full",
        description=(
            "full: all weights; partial: last_layers and trainable; all others: added weights (and "
            "trainable), the model's own are frozen: lora, adalora, ia3 modify its matrices, "
            "bottleneck follows its layers, prompt_tuning (arXiv:2104.08691) and p_tuning "
            "(arXiv:2103.10385) extend its input embeddings, prefix_tuning (arXiv:2101.00190) the "
            "keys and values of each layer."
        ),
    )
    last_layers: int = Identity(
        0,
        ge=0,
        description=(
            "partial: train this number of last layers, and all weights after them (norm, and the "
            "output layer if it has its own matrix)."
        ),
    )
    trainable: Patterns = Identity(
        (),
        description=(
            "Also train weights whose name matches one of these patterns (*.self_attn.*, "
            "lm_head.*, *.bias)."
        ),
    )
    frozen: Patterns = Identity(
        (),
        description=(
            "Freeze weights whose name matches one of these patterns; takes precedence over the "
            "other fields."
        ),
    )
    lora: LoraSection = Field(default_factory=LoraSection, description="method lora.")
    adalora: AdaloraSection = Field(default_factory=AdaloraSection, description="method adalora.")
    prompt: PromptSection = Field(
        default_factory=PromptSection,
        description="methods prompt_tuning, p_tuning, prefix_tuning.",
    )
    bottleneck: BottleneckSection = Field(
        default_factory=BottleneckSection, description="method bottleneck."
    )
    layer_decay: float = Field(
        1.0,
        gt=0,
        le=1,
        description=(
            "The learning rate of each layer is that of the next layer times this; embeddings have "
            "the lowest (arXiv:1801.06146); 1: equal."
        ),
    )
    unfreeze_steps: int = Field(
        0,
        ge=0,
        description=(
            "Gradual unfreezing: the head is trained from the start, each lower layer this number "
            "of steps after the one above, and the embeddings last (arXiv:1801.06146); 0: all from "
            "the start."
        ),
    )
    label_smoothing: float = Field(
        0.0,
        ge=0,
        lt=1,
        description=(
            "Probability of each target that is spread evenly over the vocabulary (Szegedy et al., "
            "arXiv:1512.00567); held-out losses are reported without it."
        ),
    )
    neftune_alpha: float = Field(
        0.0,
        ge=0,
        description=(
            "Noise on input embeddings in training, uniform within alpha / sqrt(tokens of the "
            "sample x width) (NEFTune, arXiv:2310.05914); 0: no noise."
        ),
    )
    adversarial: AdversarialSection = Field(
        default_factory=AdversarialSection, description="Adversarial training on embeddings."
    )
    anchor: AnchorSection = Field(
        default_factory=AnchorSection,
        description=(
            "Pull towards the initial weights of the run; new weights (a head, an adapter) are not "
            "pulled."
        ),
    )
    # Part of the identity, unlike other regularization: whether there is an average decides what
    # state a checkpoint holds.
    ema_decay: float = Identity(
        0.0,
        ge=0,
        lt=1,
        description=(
            "Decay of an exponential moving average of the weights (evaluation.weights: ema "
            "evaluates and exports it); 0: no average."
        ),
    )


SECTIONS: dict[str, tuple[str, ...]] = {
    "lora": ("lora",),
    "adalora": ("adalora",),
    "bottleneck": ("bottleneck",),
    "prompt": PROMPT_METHODS,
}
"""Sub-sections and the methods that use them."""


def _trainable_weights(tuning: TuningSection) -> Iterator[str]:
    if tuning.method == "partial" and not tuning.last_layers and not tuning.trainable:
        yield (
            "tuning.method=partial: no weights to train are named. Needs tuning.last_layers or "
            "tuning.trainable. Set one, or tuning.method=full."
        )

    if tuning.last_layers and tuning.method != "partial":
        yield (
            f"tuning.last_layers={tuning.last_layers}: not used by tuning.method={tuning.method}. "
            "Allowed with tuning.method=partial. Set that, or remove it."
        )

    if tuning.trainable and tuning.method == "full":
        yield (
            "tuning.trainable: tuning.method=full trains all weights. Allowed with all other "
            "methods. Set tuning.method=partial, or remove it."
        )


def _adapter_targets(tuning: TuningSection) -> Iterator[str]:
    for name in ("lora", "adalora", "bottleneck"):
        targets = getattr(tuning, name).targets
        if len(targets) == 1:
            continue

        # As one of several, a keyword would be taken for the name of a layer.
        for keyword in {"all-linear", "auto"} & set(targets):
            yield (
                f"tuning.{name}.targets={list(targets)}: {keyword} stands for a list of layers. It "
                "is allowed alone. Remove it, or the others."
            )


def _unused_sections(tuning: TuningSection) -> Iterator[str]:
    for name, methods in SECTIONS.items():
        section = getattr(tuning, name)
        if tuning.method not in methods and section != type(section)():
            yield (
                f"tuning.{name}: not used by tuning.method={tuning.method}. Allowed with "
                f"tuning.method={' or '.join(methods)}. Set that, or remove it."
            )


def _prompt(tuning: TuningSection) -> Iterator[str]:
    method = f"tuning.method={tuning.method}"
    prompt = tuning.prompt
    if tuning.method not in PROMPT_METHODS:
        return

    if (prompt.init == "text") != (prompt.text is not None):
        yield (
            f"tuning.prompt.init={prompt.init}: init=text and tuning.prompt.text, its initial "
            "text, need each other. Set both, or neither."
        )

    for field, only in {"init": "prompt_tuning", "projection": "prefix_tuning"}.items():
        if tuning.method != only and not prompt.is_default(field):
            yield (
                f"tuning.prompt.{field}: not used by {method}. Allowed with tuning.method={only}. "
                "Remove it."
            )

    # Only these two compute virtual tokens by a network, prefix_tuning only on request.
    uses_network = tuning.method == "p_tuning" or (
        tuning.method == "prefix_tuning" and prompt.projection
    )
    if prompt.hidden_size and not uses_network:
        yield (
            f"tuning.prompt.hidden_size={prompt.hidden_size}: {method} has no network here. "
            "Allowed with p_tuning, and with prefix_tuning and tuning.prompt.projection. Remove it."
        )


def _prompt_layers(tuning: TuningSection) -> Iterator[str]:
    if tuning.method in PROMPT_METHODS and (tuning.unfreeze_steps or tuning.layer_decay < 1):
        yield (
            f"tuning.method={tuning.method}: virtual tokens belong to no layer, so "
            "tuning.layer_decay and tuning.unfreeze_steps have no meaning. Allowed with methods "
            "that train layers. Remove them."
        )


def _adalora(tuning: TuningSection) -> Iterator[str]:
    adalora = tuning.adalora
    if tuning.method != "adalora":
        return

    if adalora.end_step <= adalora.begin_step:
        yield (
            f"tuning.adalora.end_step={adalora.end_step}: ranks are allocated between "
            f"tuning.adalora.begin_step={adalora.begin_step} and this step. A later step is "
            "needed. Set it, below the steps of the run."
        )

    if adalora.rank >= adalora.initial_rank:
        yield (
            f"tuning.adalora.rank={adalora.rank}: not below "
            f"tuning.adalora.initial_rank={adalora.initial_rank}, so no rank would be removed. "
            "Lower it."
        )


def _adversarial(tuning: TuningSection) -> Iterator[str]:
    section = tuning.adversarial
    used_by = {
        "epsilon": ("fgm", "pgd"),
        "weight": ("fgm", "pgd"),
        "steps": ("pgd",),
        "step_size": ("pgd",),
    }
    for field, methods in used_by.items():
        if section.method not in methods and not section.is_default(field):
            yield (
                f"tuning.adversarial.{field}={getattr(section, field)}: not used by "
                f"tuning.adversarial.method={section.method}. Allowed with {' or '.join(methods)}. "
                "Set such a method, or remove it."
            )

    # The farthest that all steps in one direction get: a larger ball would never be projected onto.
    reach = section.steps * section.step_size
    if section.method == "pgd" and reach < section.epsilon:
        yield (
            f"tuning.adversarial.epsilon={section.epsilon}: out of reach of {section.steps} steps "
            f"of step_size={section.step_size}. At most {reach:g} is allowed. Use more or longer "
            "steps, or lower epsilon."
        )


def _anchor(tuning: TuningSection) -> Iterator[str]:
    anchor = tuning.anchor
    if (anchor.method == "none") != (anchor.strength == 0):
        yield (
            f"tuning.anchor.strength={anchor.strength:g}: tuning.anchor.method is {anchor.method}. "
            "Allowed: l2 or ewc with a strength above 0, or neither. Set the other, or remove it."
        )

    if (anchor.method == "ewc") != bool(anchor.data):
        if anchor.data:
            state, remedy = "set", "Remove it"
        else:
            state, remedy = "not set", "Set it"

        yield (
            f"tuning.anchor.data: is {state} with tuning.anchor.method={anchor.method}. ewc, and "
            f"only ewc, needs it. {remedy}, or change the method."
        )

    if anchor.max_samples and anchor.method != "ewc":
        yield (
            f"tuning.anchor.max_samples={anchor.max_samples}: not used by "
            f"tuning.anchor.method={anchor.method}. Allowed with ewc. Remove it."
        )

    is_pointless = tuning.method in ADAPTER_METHODS and not tuning.trainable
    if anchor.method != "none" and is_pointless:
        yield (
            f"tuning.anchor.method={anchor.method}: tuning.method={tuning.method} only trains "
            "added weights, which have no initial values to return to. Allowed with full, partial, "
            "or tuning.trainable. Remove it."
        )


CHECKS = (
    _trainable_weights,
    _adapter_targets,
    _unused_sections,
    _prompt,
    _prompt_layers,
    _adalora,
    _adversarial,
    _anchor,
)
