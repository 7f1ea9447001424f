"""Regularizers after each optimizer step: a pull towards the initial weights, and averaging.

The pull is that of L2-SP (Li et al., arXiv:1802.01483) or, weighted by the Fisher information, of
elastic weight consolidation (Kirkpatrick et al., arXiv:1612.00796). Like weight decay it is
decoupled from the gradient (RecAdam, Chen et al., arXiv:2004.12651): it is neither clipped nor
scaled by the optimizer's moments. Each step is the proximal step of
strength / 2 * sum of fisher * (weight - anchor)^2, so that no strength is too large. The average is
exponential.

Initial weights ("anchor"), Fisher information and average are further element-wise state of the
optimizer: they are sharded, saved and resharded with it. New weights (a head, an adapter) have no
initial value to be pulled to; their anchor is NaN. If an update is skipped, so are the
regularizers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from dist_ft.config.sections.tuning import TuningSection
from dist_ft.model.adapters.added_layers import is_added

if TYPE_CHECKING:
    from dist_ft.engine.base import StateSlice

ANCHOR, FISHER, AVERAGE = "anchor", "fisher", "ema"


@dataclass(frozen=True)
class Regularizers:
    """The regularizers of a run.

    Attributes:
        strength: coefficient of the decay toward the initial weights; each step multiplies it by
            the learning rate.
        decay: decay of the moving average of the weights.
        keys: optimizer state that is needed.
    """

    strength: float = 0.0
    decay: float = 0.0
    keys: tuple[str, ...] = ()

    @classmethod
    def from_config(cls, section: TuningSection) -> Regularizers:
        """Return the regularizers that the config enables."""
        keys_by_method = {"none": (), "l2": (ANCHOR,), "ewc": (ANCHOR, FISHER)}
        keys: tuple[str, ...] = keys_by_method[section.anchor.method]
        if section.ema_decay:
            keys = (*keys, AVERAGE)
        return cls(section.anchor.strength, section.ema_decay, keys)

    def create_state(
        self, optimizer: torch.optim.Optimizer, tensors: Iterable[torch.Tensor]
    ) -> None:
        """Add the regularizers' state to the optimizer's state of `tensors`."""
        if not self.keys:
            return

        for tensor in tensors:
            for key in self.keys:
                optimizer.state[tensor][key] = torch.zeros_like(tensor, requires_grad=False)

    @torch.no_grad()
    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Pull the weights in the optimizer's groups to their anchors, and update their average."""
        if not self.keys:
            return

        # By groups, not by state: ZeRO-3 steps one sub-group at a time, and only its weights are
        # in the groups then. Over the state, each sub-group's step would pull all weights again.
        for group in optimizer.param_groups:
            for weight in group["params"]:
                state = optimizer.state[weight]

                # The average comes last: it follows the weights that the step ends with.
                if ANCHOR in state:
                    rate = group["lr"] * self.strength
                    pull_to_anchor(weight, state[ANCHOR], rate, state.get(FISHER))
                if AVERAGE in state:
                    state[AVERAGE].lerp_(weight, 1 - self.decay)


def pull_to_anchor(
    weight: torch.Tensor, anchor: torch.Tensor, rate: float, fisher: torch.Tensor | None = None
) -> None:
    """Move `weight` towards its `anchor` in place, by rate * fisher / (1 + rate * fisher).

    Elements whose anchor is NaN stay unchanged.
    """
    # At most 1: a proximal step reaches the anchor but never passes it.
    share: float | torch.Tensor = rate / (1 + rate)
    if fisher is not None:
        share = fisher * rate / (1 + fisher * rate)

    distance = (anchor - weight).nan_to_num_(nan=0.0)
    weight.add_(distance * share)


def initialize_state(
    state_slices: Callable[[], Iterable[StateSlice]], new_weights: Set[str]
) -> None:
    """Store the initial weights of a run as anchor and average.

    Args:
        state_slices: the engine's.
        new_weights: names of weights without an anchor; neither have weights of an adapter.
    """
    # An engine lists the weights of a slice before their optimizer state, so one pass is enough.
    weights: dict[tuple[str, int], torch.Tensor] = {}
    for part in state_slices():
        if part.key == "param":
            weights[part.name, part.offset] = part.read().float().cpu()
        elif part.key in (ANCHOR, AVERAGE):
            values = weights[part.name, part.offset]
            is_new = part.name in new_weights or is_added(part.name)

            # The average of a new weight starts from its initial value like any other.
            if part.key == ANCHOR and is_new:
                part.write(torch.full_like(values, torch.nan))
            else:
                part.write(values.clone())


@torch.no_grad()
def accumulate_fisher(optimizer: torch.optim.Optimizer) -> None:
    """Add the squared gradients of the weights in the optimizer's groups to their Fisher state."""
    # By groups, for the same reason as in `Regularizers.after_step`.
    for group in optimizer.param_groups:
        for weight in group["params"]:
            if weight.grad is not None:
                optimizer.state[weight][FISHER].add_(weight.grad.float().square())


def scale_fisher(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Multiply all Fisher state by `factor`."""
    for state in optimizer.state.values():
        state[FISHER].mul_(factor)


@torch.no_grad()
def swap_average(optimizer: torch.optim.Optimizer) -> None:
    """Swap all weights with their averages; a second call undoes it to the last bit."""
    for weight, state in optimizer.state.items():
        if AVERAGE in state:
            # Copies keep the tensors in place, which engines and state slices refer to.
            previous = weight.detach().clone()
            weight.copy_(state[AVERAGE])
            state[AVERAGE].copy_(previous)
