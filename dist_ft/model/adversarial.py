"""Adversarial training: besides the batch as it is, one whose input embeddings were moved to where the loss is larger.

FGM (Miyato et al., arXiv:1605.07725) takes one step along the gradient; PGD (Madry et al., arXiv:1706.06083) several,
each time back into the ball around the embeddings; it begins at their middle, not at a random place. Lengths are L2 and
per sample, so what is packed or padded beside a sample, lanes and workers do not matter; padding has no gradient and
is not moved. All passes of a lane draw the same dropout and noise, so the gradient is that of the network just asked.
Every lane makes the same number of passes, one without targets too. Does not know engines.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from dist_ft.config.sections.tuning import AdversarialSection
from dist_ft.core.errors import ModelError

if TYPE_CHECKING:
    from dist_ft.model.trainable_model import TrainableModel

MIN_NORM = 1e-30
"""What a norm is at least: a gradient of zero gives no perturbation."""


class Adversary:
    """Moves the input embeddings of a `Learner` during the passes of one lane."""

    def __init__(self, section: AdversarialSection, learner: TrainableModel) -> None:
        """Stand behind the embedding layer of `learner` (of an encoder-decoder, the encoder's)."""
        self._section = section
        self._learner = learner
        self._active = False
        self._moves: list[torch.Tensor] = []
        self._gradients: list[torch.Tensor | None] = []
        self._seen: list[torch.Tensor] = []
        self._sizes: list[torch.Tensor] = []
        self._embedding(learner.model).register_forward_hook(self._watch)

    @staticmethod
    def _embedding(model: Any) -> torch.nn.Module:
        return (
            model.get_encoder() if model.config.is_encoder_decoder else model
        ).get_input_embeddings()

    def learn(
        self,
        forward: Callable[[], torch.Tensor],
        backward: Callable[[torch.Tensor, float, bool], None],
        ask: Callable[[], torch.Tensor],
    ) -> torch.Tensor:
        """Do all passes of a lane; return the loss () of the batch as it is.

        Args:
            forward: returns the loss; the same whenever it is called, but for the embeddings.
            backward: takes the loss, its weight, and whether it is the last of this lane; adds to the gradient.
            ask: as `forward`, for a pass after which only the gradient at the embeddings is asked for.
        """
        section = self._section
        steps, size = (
            (1, section.epsilon) if section.method == "fgm" else (section.steps, section.step_size)
        )
        self._active, self._moves = True, []
        try:
            self._begin()
            loss = forward()
            backward(loss, 1.0, False)
            self._move(size)
            for _ in range(steps - 1):
                self._begin()
                asked = ask()
                self._gradients = list(torch.autograd.grad(asked, self._seen))
                self._move(size)
            self._begin()
            backward(forward(), section.weight, True)
            return loss
        finally:
            self._active, self._moves, self._gradients, self._seen = False, [], [], []

    def _begin(self) -> None:
        self._gradients, self._seen, self._sizes = [], [], []

    def _watch(
        self, _embedding: torch.nn.Module, _args: Any, output: torch.Tensor
    ) -> torch.Tensor | None:
        """Move embeddings (B, T, H) as found so far, and take note of the gradient there; a forward hook."""
        if not self._active:
            return None
        number = len(self._seen)
        moved = output + self._moves[number].to(output.dtype) if self._moves else output
        if not moved.requires_grad:  # the embeddings do not learn
            moved = moved.detach().requires_grad_()
        self._seen.append(moved)
        self._gradients.append(None)
        self._sizes.append(self._learner.sample_lengths(output.shape).to(output.device))
        moved.register_hook(lambda gradient: self._gradients.__setitem__(number, gradient.detach()))
        return moved

    def _move(self, step_size: float) -> None:
        """Go `step_size` along the gradient of each sample, and back to within epsilon of where it was."""
        if not self._gradients or any(gradient is None for gradient in self._gradients):
            raise ModelError(
                f"tuning.adversarial.method={self._section.method}: the loss of this model has no "
                "gradient at its input embeddings; models that embed tokens by get_input_embeddings() "
                "are allowed; use method none, or another model"
            )
        steps = [
            step_along_gradient(gradient.float(), sizes, step_size)
            for gradient, sizes in zip(self._gradients, self._sizes, strict=True)
            if gradient is not None
        ]
        ends = (
            [move + step for move, step in zip(self._moves, steps, strict=True)]
            if self._moves
            else steps
        )
        self._moves = [
            clip_to_epsilon(end, sizes, self._section.epsilon)
            for end, sizes in zip(ends, self._sizes, strict=True)
        ]


def sample_norms(values: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """Return at each place of `values` (B, T, H) the L2 norm of its sample, (B, T, 1); `sizes` (N,) tile B*T."""
    squares = values.square().sum(-1).reshape(-1)
    of_samples = torch.segment_reduce(
        squares, "sum", lengths=sizes
    ).sqrt()  # in order: the same to the last bit
    return torch.repeat_interleave(of_samples, sizes).reshape(*values.shape[:2], 1)


def step_along_gradient(gradient: torch.Tensor, sizes: torch.Tensor, length: float) -> torch.Tensor:
    """Return, (B, T, H), a step of `length` along each sample's gradient."""
    return gradient * (length / sample_norms(gradient, sizes).clamp(min=MIN_NORM))


def clip_to_epsilon(move: torch.Tensor, sizes: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Return `move` (B, T, H), that of samples longer than `epsilon` shortened to it."""
    return move * (epsilon / sample_norms(move, sizes).clamp(min=MIN_NORM)).clamp(max=1.0)


def train_lane(
    adversary: Adversary | None,
    forward: Callable[[], torch.Tensor],
    backward: Callable[[torch.Tensor, float, bool], None],
    ask: Callable[[], torch.Tensor],
) -> torch.Tensor:
    """Learn from a lane, with an adversary or without; return its loss (), detached. See `Adversary.learn`."""
    if adversary is not None:
        return adversary.learn(forward, backward, ask).detach()
    loss = forward()
    backward(loss, 1.0, True)
    return loss.detach()
