"""Sub-sections of `tuning` for parameter-efficient methods: adapters and virtual tokens."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from dist_ft.config.sections.section import Identity, Section, as_tuple

Method = Literal[
    "full",
    "partial",
    "lora",
    "adalora",
    "ia3",
    "bottleneck",
    "prompt_tuning",
    "p_tuning",
    "prefix_tuning",
]
PROMPT_METHODS = ("prompt_tuning", "p_tuning", "prefix_tuning")
"""Methods with virtual tokens."""
MERGEABLE_METHODS = ("lora", "adalora", "ia3")
"""Methods whose weights can be merged into the model's own."""
ADAPTER_METHODS = (*MERGEABLE_METHODS, "bottleneck", *PROMPT_METHODS)
"""Methods that add weights."""
Patterns = Annotated[tuple[str, ...], BeforeValidator(as_tuple)]
"""One pattern of names or several."""


class LoraSection(Section):
    """Low-rank matrices next to frozen ones (Hu et al., arXiv:2106.09685)."""

    rank: int = Identity(8, ge=1, description="Rank of the added matrices.")
    alpha: float = Identity(
        16, gt=0, description="Their scale is alpha / rank (rslora: alpha / sqrt(rank))."
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout of their input.")
    targets: Patterns = Identity(
        ("all-linear",),
        min_length=1,
        description=(
            "Layers with added matrices: suffixes of names (q_proj, v_proj), or all-linear: every "
            "linear layer but the output layer."
        ),
    )
    rslora: bool = Identity(
        False, description="Scale by the square root of the rank (arXiv:2312.03732)."
    )
    dora: bool = Identity(
        False, description="Train magnitude and direction separately (arXiv:2402.09353)."
    )


class PromptSection(Section):
    """Virtual tokens before each sample of a frozen model: prompt, P- and prefix tuning."""

    tokens: int = Identity(20, ge=1, description="Number of virtual tokens before each sample.")
    init: Literal["vocabulary", "random", "text"] = Identity(
        "vocabulary",
        description=(
            "prompt_tuning: initialize them as embeddings of random tokens of the vocabulary, as "
            "random vectors with the scale of new embeddings, or as embeddings of prompt.text."
        ),
    )
    text: str | None = Identity(
        None,
        min_length=1,
        description=(
            "init text: the initial text, repeated or truncated to prompt.tokens tokens; default: "
            "none."
        ),
    )
    hidden_size: int = Identity(
        0,
        ge=0,
        description=(
            "p_tuning, and prefix_tuning with projection: width of the network that computes them; "
            "0: the width of the model."
        ),
    )
    projection: bool = Identity(
        False,
        description=(
            "prefix_tuning: a network of two layers computes keys and values; off: they are "
            "trained directly."
        ),
    )


class AdaloraSection(Section):
    """Low-rank matrices whose ranks are allocated to important layers (arXiv:2303.10512).

    The budget of ranks falls from initial_rank to rank per layer between two steps; the least
    important ones are set to zero (Zhang et al.).
    """

    initial_rank: int = Identity(12, ge=2, description="Initial rank of the added matrices.")
    rank: int = Identity(
        8, ge=1, description="Final mean rank of the added matrices; below initial_rank."
    )
    alpha: float = Identity(16, gt=0, description="Their scale is alpha / initial_rank.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout of their input.")
    targets: Patterns = Identity(
        ("all-linear",),
        min_length=1,
        description=(
            "Layers with added matrices: suffixes of names (q_proj, v_proj), or all-linear: every "
            "linear layer but the output layer."
        ),
    )
    begin_step: int = Identity(0, ge=0, description="Step up to which all ranks are used.")
    end_step: int = Identity(
        0,
        ge=0,
        description=(
            "Step at which the final budget is reached; ranks are fixed from then on; required, "
            "after begin_step."
        ),
    )
    every_steps: int = Identity(10, ge=1, description="Steps between allocations of the ranks.")
    orthogonality: float = Field(
        0.5,
        ge=0,
        description="Weight in the training loss of the added matrices' deviation from orthogonal.",
    )


class BottleneckSection(Section):
    """Bottleneck adapters after frozen layers (arXiv:1902.00751).

    Down-projection, activation and up-projection, added to their input.
    """

    size: int = Identity(64, ge=1, description="Width of the bottleneck.")
    activation: Literal["gelu", "relu", "silu", "tanh"] = Identity(
        "gelu", description="Activation function of the bottleneck."
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout of the bottleneck.")
    targets: Patterns = Identity(
        ("auto",),
        min_length=1,
        description=(
            "Linear layers that an adapter follows: suffixes of names (o_proj, mlp.down_proj), or "
            "auto: the last one of each attention and feed-forward block, as in the paper."
        ),
    )
