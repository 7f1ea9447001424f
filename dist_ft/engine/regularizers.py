"""What an optimizer does besides following gradients: it pulls weights back to where they began, and averages them.

The pull is that of L2-SP (Li et al., arXiv:1802.01483) or, weighed by the Fisher information, of elastic weight
consolidation (Kirkpatrick et al., arXiv:1612.00796). It is decoupled from the gradient, as weight decay is (RecAdam,
Chen et al., arXiv:2004.12651): neither clipped nor scaled by the optimizer's moments. Each step it is the proximal one
of strength / 2 * sum of fisher * (weight - anchor)^2, so that no strength is too large. The average is exponential.

Where weights began, their Fisher information and their average are further state of the optimizer, element by element:
they are sharded, saved and resharded with it. New weights (a head, an adapter) have no place to be pulled to: their
anchor is NaN. A step that changes nothing does none of this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from dist_ft.config.sections.tuning import TuningSection
from dist_ft.model.adapters.added_layers import (
    is_added,
)

if TYPE_CHECKING:
    from dist_ft.engine.base import StateSlice

ANCHOR, FISHER, AVERAGE = "anchor", "fisher", "ema"


@dataclass(frozen=True)
class Regularizers:
    """What is done after each step of the optimizer.

    Attributes:
        strength: of the pull to where weights began, times the learning rate each step.
        decay: of the average.
        keys: the state this needs.
    """

    strength: float = 0.0
    decay: float = 0.0
    keys: tuple[str, ...] = ()

    @classmethod
    def from_config(cls, section: TuningSection) -> Regularizers:
        """Return those of a run."""
        anchor = {"none": (), "l2": (ANCHOR,), "ewc": (ANCHOR, FISHER)}[section.anchor.method]
        return cls(
            section.anchor.strength,
            section.ema_decay,
            (*anchor, *((AVERAGE,) if section.ema_decay else ())),
        )

    def ensure(self, optimizer: torch.optim.Optimizer, tensors: Iterable[torch.Tensor]) -> None:
        """Make room for the state beside what the optimizer has of `tensors`."""
        for tensor in tensors if self.keys else ():
            for key in self.keys:
                optimizer.state[tensor][key] = torch.zeros_like(tensor, requires_grad=False)

    @torch.no_grad()
    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Pull and average the weights in the optimizer's groups."""
        for group in optimizer.param_groups if self.keys else ():
            for weight in group["params"]:
                state = optimizer.state[weight]
                if ANCHOR in state:
                    pull_to_anchor(weight, state[ANCHOR], group["lr"] * self.strength, state.get(FISHER))
                if AVERAGE in state:
                    state[AVERAGE].lerp_(weight, 1 - self.decay)


def pull_to_anchor(
    weight: torch.Tensor, anchor: torch.Tensor, rate: float, fisher: torch.Tensor | None = None
) -> None:
    """Move `weight` to its `anchor`, in place, where that is a number: by rate * fisher / (1 + rate * fisher)."""
    share = rate / (1 + rate) if fisher is None else fisher * rate / (1 + fisher * rate)
    weight.add_((anchor - weight).nan_to_num_(nan=0.0) * share)


def initialize_state(slots: Callable[[], Iterable[StateSlice]], new: Set[str]) -> None:
    """Note the weights a run begins with as anchor and average; those `new`, or added to the model, have no anchor."""
    held: dict[tuple[str, int], torch.Tensor] = {}
    for slot in slots():
        if slot.key == "param":
            held[slot.name, slot.offset] = slot.read().float().cpu()
        elif slot.key in (ANCHOR, AVERAGE):
            values = held[slot.name, slot.offset]
            free = slot.key == ANCHOR and (slot.name in new or is_added(slot.name))
            slot.write(torch.full_like(values, torch.nan) if free else values.clone())


@torch.no_grad()
def accumulate_fisher(optimizer: torch.optim.Optimizer) -> None:
    """Add the squared gradient of the weights in the optimizer's groups to their Fisher information."""
    for group in optimizer.param_groups:
        for weight in group["params"]:
            if weight.grad is not None:
                optimizer.state[weight][FISHER].add_(weight.grad.float().square())


def scale_fisher(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Multiply all Fisher information."""
    for state in optimizer.state.values():
        state[FISHER].mul_(factor)


@torch.no_grad()
def swap_average(optimizer: torch.optim.Optimizer) -> None:
    """Let all weights and their averages change places; done twice, all is as before, to the last bit."""
    for weight, state in optimizer.state.items():
        if AVERAGE in state:
            before = weight.detach().clone()
            weight.copy_(state[AVERAGE])
            state[AVERAGE].copy_(before)
