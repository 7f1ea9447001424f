"""What arithmetic about a run must know of its model; `runtime.planning` finds it out. Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Weight:
    """One parameter: its name, its elements, whether it learns, and whether it decays (optimizers keep those apart)."""

    name: str
    numel: int
    learned: bool = True
    decays: bool = True


@dataclass(frozen=True)
class Held:
    """Bytes held at a peak, beyond weights and gradients (see `model.rehearsal.Peak`)."""

    activations: int
    logits: int

    @property
    def total(self) -> int:
        """Both."""
        return self.activations + self.logits


@dataclass(frozen=True)
class Lane:
    """What a lane holds at most while it goes forward, and backward."""

    forward: Held
    backward: Held


@dataclass(frozen=True)
class ModelShape:
    """A model without its weights.

    Attributes:
        kind: transformers' name of the architecture, such as llama.
        weights: every parameter once, tied ones under their first name, in the order of the model.
        order: of weights (places in `weights`) by module, in the order modules run.
        added: held where gradients are added to those of earlier lanes (plain engine, ZeRO-0 and 1).
        passed: held where each gradient is handed on once it is there (ZeRO-2 and 3).
        rehearsed: these two are of the code itself, not estimated.
    """

    kind: str
    weights: tuple[Weight, ...]
    order: tuple[tuple[int, ...], ...]
    added: Lane
    passed: Lane
    rehearsed: bool = True

    @property
    def num_parameters(self) -> int:
        """Of all weights."""
        return sum(weight.numel for weight in self.weights)

    @property
    def num_learned(self) -> int:
        """Of weights that learn."""
        return sum(weight.numel for weight in self.weights if weight.learned)
