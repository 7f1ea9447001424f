"""The tuning section: which weights learn, and what keeps them from learning by heart."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from dist_ft.config.sections.data import Sources
from dist_ft.config.sections.section import Identity, Section


def _as_tuple(value: object) -> object:
    """Accept one name for a list of one."""
    return (value,) if isinstance(value, str) else value


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
PROMPTS = ("prompt_tuning", "p_tuning", "prefix_tuning")
"""Methods of virtual tokens."""
MERGED = ("lora", "adalora", "ia3")
"""Methods whose weights can be added into the model's own."""
ADDED = (*MERGED, "bottleneck", *PROMPTS)
"""Methods that add weights."""
Patterns = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]


class LoraSection(Section):
    """Low-rank matrices beside frozen ones (Hu et al., arXiv:2106.09685)."""

    rank: int = Identity(8, ge=1, description="Rank of the added matrices.")
    alpha: float = Identity(
        16, gt=0, description="They are scaled by alpha / rank (rslora: alpha / sqrt(rank))."
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout of what they are given.")
    targets: Patterns = Identity(
        ("all-linear",),
        min_length=1,
        description=(
            "Layers that get them: ends of names (q_proj, v_proj), or all-linear: every linear layer but the output's."
        ),
    )
    rslora: bool = Identity(False, description="Scale by the root of the rank (arXiv:2312.03732).")
    dora: bool = Identity(False, description="Learn length and direction apart (arXiv:2402.09353).")


class PromptSection(Section):
    """Virtual tokens before each sample, in front of a frozen model: prompt tuning, P-tuning, prefix tuning."""

    tokens: int = Identity(20, ge=1, description="Virtual tokens before each sample.")
    init: Literal["vocabulary", "random", "text"] = Identity(
        "vocabulary",
        description=(
            "prompt_tuning: they begin as the vectors of tokens drawn from the vocabulary, as random vectors as wide as "
            "new embeddings, or as those of prompt.text."
        ),
    )
    text: str | None = Identity(
        None,
        min_length=1,
        description=(
            "init text: what they begin as, repeated or cut to prompt.tokens tokens; none: no text."
        ),
    )
    hidden_size: int = Identity(
        0,
        ge=0,
        description=(
            "p_tuning, and prefix_tuning with projection: width of the network that makes them; 0: as wide as the model."
        ),
    )
    projection: bool = Identity(
        False,
        description=(
            "prefix_tuning: a network of two layers makes the keys and values; off: they are learned themselves."
        ),
    )


class AdaloraSection(Section):
    """Low-rank matrices whose rank moves to where it matters (Zhang et al., arXiv:2303.10512).

    A budget of ranks falls from initial_rank to rank a layer between two steps; the weakest are set to zero.
    """

    initial_rank: int = Identity(12, ge=2, description="Rank of the added matrices at first.")
    rank: int = Identity(
        8, ge=1, description="Mean rank of the added matrices in the end; below initial_rank."
    )
    alpha: float = Identity(16, gt=0, description="They are scaled by alpha / initial_rank.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout of what they are given.")
    targets: Patterns = Identity(
        ("all-linear",),
        min_length=1,
        description=(
            "Layers that get them: ends of names (q_proj, v_proj), or all-linear: every linear layer but the output's."
        ),
    )
    begin_step: int = Identity(0, ge=0, description="Step up to which all ranks stay.")
    end_step: int = Identity(
        0,
        ge=0,
        description=(
            "Step at which the budget is reached; ranks stay from there on; needed, after begin_step."
        ),
    )
    every_steps: int = Identity(10, ge=1, description="Ranks are dealt anew every so many steps.")
    orthogonality: float = Field(
        0.5,
        ge=0,
        description=(
            "Weight, in the training loss, of how far the added matrices are from orthogonal ones."
        ),
    )


class BottleneckSection(Section):
    """Small networks behind frozen layers: down, non-linearity, up, added to what went in (arXiv:1902.00751)."""

    size: int = Identity(64, ge=1, description="Width of the narrow layer.")
    activation: Literal["gelu", "relu", "silu", "tanh"] = Identity(
        "gelu", description="Non-linearity between."
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout of the narrow layer.")
    targets: Patterns = Identity(
        ("auto",),
        min_length=1,
        description=(
            "Linear layers they stand behind: ends of names (o_proj, mlp.down_proj), or auto: the last of each attention "
            "and of each feed-forward block, as in the paper."
        ),
    )


class AdversarialSection(Section):
    """Learning besides from input embeddings moved to where the loss is larger."""

    method: Literal["none", "fgm", "pgd"] = Field(
        "none",
        description=(
            "fgm: one step along the gradient (arXiv:1605.07725), about twice the compute; pgd: several, each back into "
            "the ball of epsilon (arXiv:1706.06083), about 1 + steps times the compute; none: no such."
        ),
    )
    epsilon: float = Field(
        1.0,
        gt=0,
        description=("How far the embeddings of a sample are moved at most, together (L2 norm)."),
    )
    steps: int = Field(3, ge=1, description="pgd: steps along the gradient.")
    step_size: float = Field(0.4, gt=0, description="pgd: length of a step (L2 norm).")
    weight: float = Field(
        1.0, gt=0, description="What the loss there counts, the plain loss counting 1."
    )


class AnchorSection(Section):
    """A pull back to the weights a run began with."""

    method: Literal["none", "l2", "ewc"] = Identity(
        "none",
        description=(
            "l2: all weights alike (L2-SP, arXiv:1802.01483); ewc: each as its Fisher information on `data` says (elastic "
            "weight consolidation, arXiv:1612.00796); none: no such."
        ),
    )
    strength: float = Field(
        0.0,
        ge=0,
        description=(
            "Each step a weight goes back by about the learning rate times this (ewc: times its Fisher information) times "
            "its distance; decoupled from the gradient, as weight decay is."
        ),
    )
    data: Sources = Field(
        (),
        description=(
            "ewc: data of what is to be kept, in the training data's format; gone through once, before the first step."
        ),
    )
    max_samples: int = Field(0, ge=0, description="ewc: first so many samples of `data`; 0: all.")


class TuningSection(Section):
    """Which weights learn, and how they are kept from learning by heart.

    What does not learn takes no optimizer memory and is written once to checkpoints.
    """

    method: Method = Identity(
        "full",
        description=(
            "full: all weights; partial: last_layers and trainable; all others: added weights (and trainable), the model's "
            "own are frozen: lora, adalora, ia3 beside its matrices, bottleneck behind its layers, prompt_tuning "
            "(arXiv:2104.08691) and p_tuning (arXiv:2103.10385) before its embeddings, prefix_tuning (arXiv:2101.00190) "
            "before the keys and values of each layer."
        ),
    )
    last_layers: int = Identity(
        0,
        ge=0,
        description=(
            "partial: so many of the last layers learn, with what comes after them (norm, and the output layer where it "
            "has a matrix of its own)."
        ),
    )
    trainable: Patterns = Identity(
        (),
        description=(
            "Besides, weights whose name matches one of these patterns (*.self_attn.*, lm_head.*, *.bias) learn."
        ),
    )
    frozen: Patterns = Identity(
        (),
        description=(
            "Weights whose name matches one of these patterns do not learn, whatever the other fields say."
        ),
    )
    lora: LoraSection = Field(default_factory=LoraSection, description="method lora.")
    adalora: AdaloraSection = Field(default_factory=AdaloraSection, description="method adalora.")
    prompt: PromptSection = Field(
        default_factory=PromptSection,
        description=("methods prompt_tuning, p_tuning, prefix_tuning."),
    )
    bottleneck: BottleneckSection = Field(
        default_factory=BottleneckSection, description="method bottleneck."
    )
    layer_decay: float = Field(
        1.0,
        gt=0,
        le=1,
        description=(
            "Each layer's learning rate is that of the one above times this, the embeddings' the least (arXiv:1801.06146); "
            "1: all the same."
        ),
    )
    unfreeze_steps: int = Field(
        0,
        ge=0,
        description=(
            "Gradual unfreezing: the head learns from the start, each layer below so many steps after the one above, then "
            "the embeddings (arXiv:1801.06146); 0: all from the start."
        ),
    )
    label_smoothing: float = Field(
        0.0,
        ge=0,
        lt=1,
        description=(
            "Share of each target's probability spread evenly over the vocabulary (Szegedy et al., arXiv:1512.00567); "
            "training only, held-out losses are told without."
        ),
    )
    neftune_alpha: float = Field(
        0.0,
        ge=0,
        description=(
            "Noise added to input embeddings in training, uniform within alpha / sqrt(tokens of the sample x width) "
            "(NEFTune, arXiv:2310.05914); 0: none."
        ),
    )
    adversarial: AdversarialSection = Field(
        default_factory=AdversarialSection, description=("Adversarial training on embeddings.")
    )
    anchor: AnchorSection = Field(
        default_factory=AnchorSection,
        description=(
            "Pull back to the weights the run began with; new ones (a head, an adapter) are not pulled."
        ),
    )
    ema_decay: float = Identity(
        0.0,
        ge=0,
        lt=1,
        description=(
            "Keep an exponential moving average of the weights: of the one before so much, of the weights after each step "
            "the rest (evaluation.weights: ema evaluates and exports it); 0: none."
        ),
    )
