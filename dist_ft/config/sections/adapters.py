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
"""Methods that train virtual tokens (soft prompts)."""

# Each of these changes a weight matrix by a sum or a factor. A bottleneck has a nonlinearity, and
# virtual tokens change the input: neither can be written into a matrix.
MERGEABLE_METHODS = ("lora", "adalora", "ia3")
"""Methods whose added weights can be merged into the weights of the model."""
ADAPTER_METHODS = (*MERGEABLE_METHODS, "bottleneck", *PROMPT_METHODS)
"""Methods that add weights to the model."""
Patterns = Annotated[tuple[str, ...], BeforeValidator(as_tuple)]
"""Name patterns; YAML may give a single string in place of a list."""


class LoraSection(Section):
    """LoRA: low-rank matrices added to frozen weights (Hu et al., arXiv:2106.09685)."""

    # Rank and targets decide the shapes in a checkpoint, and alpha what its matrices mean. Dropout
    # only acts while training, so it may change in a resume.
    rank: int = Identity(8, ge=1, description="Rank of the added matrices.")
    alpha: float = Identity(
        16,
        gt=0,
        description="The low-rank update is scaled by alpha / rank (rslora: alpha / sqrt(rank)).",
    )
    dropout: float = Field(
        0.0, ge=0, lt=1, description="Dropout on the input of the added matrices."
    )
    targets: Patterns = Identity(
        ("all-linear",),
        min_length=1,
        description=(
            "Layers with added matrices: name suffixes (q_proj, v_proj), or all-linear: every "
            "linear layer except the output layer."
        ),
    )
    rslora: bool = Identity(
        False, description="Divide alpha by the square root of the rank (arXiv:2312.03732)."
    )
    dora: bool = Identity(
        False,
        description="Train magnitude and direction of the weights separately (arXiv:2402.09353).",
    )


class PromptSection(Section):
    """Virtual tokens before each sample of a frozen model: prompt, P- and prefix tuning."""

    tokens: int = Identity(20, ge=1, description="Number of virtual tokens before each sample.")
    init: Literal["vocabulary", "random", "text"] = Identity(
        "vocabulary",
        description=(
            "prompt_tuning: initial virtual tokens. vocabulary: embeddings of random tokens; "
            "random: random vectors with the scale of new embeddings; text: embeddings of "
            "prompt.text."
        ),
    )
    text: str | None = Identity(
        None,
        min_length=1,
        description=(
            "prompt.init=text: the initial text, repeated or truncated to prompt.tokens tokens; "
            "default: none."
        ),
    )
    hidden_size: int = Identity(
        0,
        ge=0,
        description=(
            "p_tuning, and prefix_tuning with projection: hidden size of the network that computes "
            "the virtual tokens; 0: the hidden size of the model."
        ),
    )
    projection: bool = Identity(
        False,
        description=(
            "prefix_tuning: a two-layer network computes keys and values; off: keys and values are "
            "trained directly."
        ),
    )


class AdaloraSection(Section):
    """AdaLoRA: low-rank matrices that get ranks by importance (Zhang et al., arXiv:2303.10512).

    Between begin_step and end_step, the rank budget per matrix falls from initial_rank to rank.
    The least important singular values are set to zero.
    """

    initial_rank: int = Identity(12, ge=2, description="Initial rank of the added matrices.")
    rank: int = Identity(
        8, ge=1, description="Final mean rank of the added matrices; below initial_rank."
    )
    alpha: float = Identity(
        16, gt=0, description="The low-rank update is scaled by alpha / initial_rank."
    )
    dropout: float = Field(
        0.0, ge=0, lt=1, description="Dropout on the input of the added matrices."
    )
    targets: Patterns = Identity(
        ("all-linear",),
        min_length=1,
        description=(
            "Layers with added matrices: name suffixes (q_proj, v_proj), or all-linear: every "
            "linear layer except the output layer."
        ),
    )
    # The rank budget of a step follows from these fields alone, so a resume must have the same.
    begin_step: int = Identity(
        0, ge=0, description="Last step before the rank budget starts to fall."
    )
    end_step: int = Identity(
        0,
        ge=0,
        description=(
            "Step at which the rank budget reaches tuning.adalora.rank; ranks are fixed from then "
            "on. Required; must be after begin_step."
        ),
    )
    every_steps: int = Identity(10, ge=1, description="Steps between allocations of the ranks.")
    orthogonality: float = Field(
        0.5,
        ge=0,
        description="Weight in the training loss of the added matrices' orthogonality penalty.",
    )


class BottleneckSection(Section):
    """Bottleneck adapters after frozen layers (Houlsby et al., arXiv:1902.00751).

    An adapter is a down-projection, an activation and an up-projection, with a residual connection.
    """

    size: int = Identity(64, ge=1, description="Width of the bottleneck.")
    activation: Literal["gelu", "relu", "silu", "tanh"] = Identity(
        "gelu", description="Activation function of the bottleneck."
    )
    dropout: float = Field(
        0.0, ge=0, lt=1, description="Dropout on the activations of the bottleneck."
    )
    targets: Patterns = Identity(
        ("auto",),
        min_length=1,
        description=(
            "Linear layers that an adapter follows: name suffixes (o_proj, mlp.down_proj), or "
            "auto: the last one of each attention and feed-forward block, as in the paper."
        ),
    )
