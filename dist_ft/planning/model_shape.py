"""What the arithmetic needs to know about a model, from `runtime.preflight.model_trace`. Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class WeightShape:
    """One parameter.

    Attributes:
        name: name of the parameter.
        numel: number of its elements.
        trainable: whether it is trained.
        decays: whether it has weight decay; optimizers keep these two kinds apart.
    """

    name: str
    numel: int
    trainable: bool = True
    decays: bool = True


@dataclass(frozen=True)
class PeakBytes:
    """Bytes at a peak, on top of weights and gradients (see `model.memory_trace`)."""

    activations: int
    logits: int

    @property
    def total(self) -> int:
        """Activations and logits."""
        return self.activations + self.logits


@dataclass(frozen=True)
class LanePeaks:
    """The peaks of the forward and of the backward pass of a lane."""

    forward: PeakBytes
    backward: PeakBytes


@dataclass(frozen=True)
class ModelShape:
    """A model without its weights.

    Attributes:
        kind: transformers' name of the architecture, such as llama.
        weights: each parameter once, tied ones under their first name, in the order of the model.
        order: the numbers of the weights of each module, in the order in which modules run.
        added: peaks where gradients are added to those of earlier lanes (plain engine, ZeRO-0
            and 1).
        passed: peaks where each gradient is passed on as soon as it exists (ZeRO-2 and 3).
        traced: whether the peaks are traced from the model's code rather than estimated.
    """

    kind: str
    weights: tuple[WeightShape, ...]
    order: tuple[tuple[int, ...], ...]
    added: LanePeaks
    passed: LanePeaks
    traced: bool = True

    @property
    def num_parameters(self) -> int:
        """The number of parameters."""
        return sum(weight.numel for weight in self.weights)

    @property
    def num_trainable(self) -> int:
        """The number of trainable parameters."""
        return sum(weight.numel for weight in self.weights if weight.trainable)
