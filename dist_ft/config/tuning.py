"""The tuning section: which weights learn, and what keeps them from learning by heart."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from dist_ft.config.section import Identity, Section


def _as_tuple(value: object) -> object:
    """Accept one name for a list of one."""
    return (value,) if isinstance(value, str) else value


Patterns = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]


class LoraSection(Section):
    """Low-rank matrices beside frozen ones (Hu et al., arXiv:2106.09685)."""

    rank: int = Identity(8, ge=1, description="Rank of the added matrices.")
    alpha: float = Identity(16, gt=0, description="They are scaled by alpha / rank (rslora: alpha / sqrt(rank)).")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout of what they are given.")
    targets: Patterns = Identity(("all-linear",), min_length=1, description=(
        "Layers that get them: ends of names (q_proj, v_proj), or all-linear: every linear layer but the output's."))
    rslora: bool = Identity(False, description="Scale by the root of the rank (arXiv:2312.03732).")
    dora: bool = Identity(False, description="Learn length and direction apart (arXiv:2402.09353).")


class TuningSection(Section):
    """Which weights learn, and how they are kept from learning by heart.

    What does not learn takes no optimizer memory and is written once to checkpoints.
    """

    method: Literal["full", "partial", "lora", "ia3"] = Identity("full", description=(
        "full: all weights; partial: last_layers and trainable; lora, ia3: added weights (and trainable), the others "
        "are frozen."))
    last_layers: int = Identity(0, ge=0, description=(
        "partial: so many of the last layers learn, with what comes after them (norm, and the output layer where it "
        "has a matrix of its own)."))
    trainable: Patterns = Identity((), description=(
        "Besides, weights whose name matches one of these patterns (*.self_attn.*, lm_head.*, *.bias) learn."))
    frozen: Patterns = Identity((), description=(
        "Weights whose name matches one of these patterns do not learn, whatever the other fields say."))
    lora: LoraSection = Field(default_factory=LoraSection, description="method lora.")
    layer_decay: float = Field(1.0, gt=0, le=1, description=(
        "Each layer's learning rate is that of the one above times this, the embeddings' the least (arXiv:1801.06146); "
        "1: all the same."))
    unfreeze_steps: int = Field(0, ge=0, description=(
        "Gradual unfreezing: the head learns from the start, each layer below so many steps after the one above, then "
        "the embeddings (arXiv:1801.06146); 0: all from the start."))
    label_smoothing: float = Field(0.0, ge=0, lt=1, description=(
        "Share of each target's probability spread evenly over the vocabulary (Szegedy et al., arXiv:1512.00567); "
        "training only, held-out losses are told without."))
    neftune_alpha: float = Field(0.0, ge=0, description=(
        "Noise added to input embeddings in training, uniform within alpha / sqrt(tokens of the sample x width) "
        "(NEFTune, arXiv:2310.05914); 0: none."))
