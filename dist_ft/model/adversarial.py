"""Adversarial training: in addition to each batch, train on one with perturbed input embeddings.

The embeddings move in the direction that increases the loss. FGM (Miyato et al., arXiv:1605.07725)
takes one step along the gradient; PGD (Madry et al., arXiv:1706.06083) takes several, each
projected back into the ball around the embeddings, starting from its center, not from a random
point. Norms are L2 and per sample, so packing, padding, lanes and workers make no difference;
padding has no gradient and does not move. All passes of a lane draw the same dropout and noise, so
each gradient is that of the same network. Every lane makes the same number of passes, also one
without targets. Independent of engines.

Dimensions: B rows of a batch, T tokens of a row, H hidden size, N samples of a batch.
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
"""Lower bound of norms that are divided by: a gradient of zero gives no perturbation."""

Forward = Callable[[], torch.Tensor]
"""Returns the loss () of a lane."""
Backward = Callable[[torch.Tensor, float, bool], None]
"""Takes the loss, its weight, and whether it is the last one of the lane; adds to the gradient."""


class Adversary:
    """Perturbs the input embeddings of a `TrainableModel` during the passes of one lane."""

    def __init__(self, section: AdversarialSection, module: TrainableModel) -> None:
        """Hook the embedding layer of `module` (of an encoder-decoder, the encoder's)."""
        self._section = section
        self._module = module
        self._is_active = False
        self._perturbations: list[torch.Tensor] = []
        # Of the current pass, one entry for each call of the embedding layer:
        self._embeddings: list[torch.Tensor] = []
        self._gradients: list[torch.Tensor | None] = []
        self._lengths: list[torch.Tensor] = []
        self._embedding_layer(module.model).register_forward_hook(self._perturb)

    @staticmethod
    def _embedding_layer(model: Any) -> torch.nn.Module:
        part = model.get_encoder() if model.config.is_encoder_decoder else model
        return part.get_input_embeddings()  # type: ignore[no-any-return]

    def run_lane(
        self, forward: Forward, backward: Backward, forward_for_gradient: Forward
    ) -> torch.Tensor:
        """Run all passes of a lane; return the loss () of the unperturbed batch.

        Args:
            forward: the same at every call, except for the embeddings.
            backward: see `Backward`.
            forward_for_gradient: like `forward`, for a pass that needs only the gradient of the
                embeddings.
        """
        section = self._section
        num_steps, step_size = section.steps, section.step_size
        if section.method == "fgm":
            num_steps, step_size = 1, section.epsilon

        self._is_active = True
        self._perturbations = []
        try:
            # The batch as it is; its gradient gives the first step. A pass that is trained on
            # anyway provides it, so FGM needs two passes and not three.
            self._start_pass()
            loss = forward()
            backward(loss, 1.0, False)
            self._step(step_size)

            # Further steps need the gradient of the embeddings only. A `backward` would add to the
            # gradients of weights, and under ZeRO would reduce them over all ranks.
            for _ in range(num_steps - 1):
                self._start_pass()
                perturbed_loss = forward_for_gradient()
                self._gradients = list(torch.autograd.grad(perturbed_loss, self._embeddings))
                self._step(step_size)

            # The perturbed batch.
            self._start_pass()
            backward(forward(), section.weight, True)
            return loss
        finally:
            # Held embeddings would keep the graph of the last pass in memory.
            self._is_active = False
            self._perturbations = []
            self._gradients = []
            self._embeddings = []

    def _start_pass(self) -> None:
        self._gradients = []
        self._embeddings = []
        self._lengths = []

    def _perturb(
        self, _embedding: torch.nn.Module, _args: Any, output: torch.Tensor
    ) -> torch.Tensor | None:
        """Perturb embeddings (B, T, H) and record their gradient; a forward hook."""
        if not self._is_active:
            return None

        # A model may embed several texts in a forward; all passes call the layer in the same order.
        number = len(self._embeddings)
        perturbed = output
        if self._perturbations:
            perturbed = output + self._perturbations[number].to(output.dtype)
        if not perturbed.requires_grad:
            # The embeddings are frozen: the graph of this pass starts here.
            perturbed = perturbed.detach().requires_grad_()

        self._embeddings.append(perturbed)
        self._gradients.append(None)
        self._lengths.append(self._module.sample_lengths(output.shape).to(output.device))

        # The engine runs the backward, so a hook collects the gradient.
        def record_gradient(gradient: torch.Tensor) -> None:
            self._gradients[number] = gradient.detach()

        perturbed.register_hook(record_gradient)
        return perturbed

    def _step(self, step_size: float) -> None:
        """Move each sample by `step_size` along its gradient, and back into the epsilon ball."""
        if not self._gradients or any(gradient is None for gradient in self._gradients):
            raise ModelError(
                f"tuning.adversarial.method={self._section.method}: the loss of this model has no "
                "gradient at its input embeddings. Only models that embed tokens by "
                "get_input_embeddings() are allowed. Use method none, or another model."
            )

        steps = []
        for gradient, lengths in zip(self._gradients, self._lengths, strict=True):
            if gradient is not None:
                steps.append(step_along_gradient(gradient.float(), lengths, step_size))
        if self._perturbations:
            steps = [old + step for old, step in zip(self._perturbations, steps, strict=True)]

        epsilon = self._section.epsilon
        self._perturbations = []
        for perturbation, lengths in zip(steps, self._lengths, strict=True):
            self._perturbations.append(clip_to_epsilon(perturbation, lengths, epsilon))


def sample_norms(values: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Return for each position of `values` (B, T, H) the L2 norm of its sample, (B, T, 1).

    `lengths` (N,) of the samples sum to B*T.
    """
    squares = values.square().sum(-1).reshape(-1)  # (B*T,)

    # A sum in order, so that it is bit-identical in every world.
    norms = torch.segment_reduce(squares, "sum", lengths=lengths).sqrt()  # (N,)
    return torch.repeat_interleave(norms, lengths).reshape(*values.shape[:2], 1)


def step_along_gradient(
    gradient: torch.Tensor, lengths: torch.Tensor, step_size: float
) -> torch.Tensor:
    """Return a step (B, T, H) of norm `step_size` along each sample's gradient."""
    norms = sample_norms(gradient, lengths).clamp(min=MIN_NORM)  # (B, T, 1)
    return gradient * (step_size / norms)


def clip_to_epsilon(
    perturbation: torch.Tensor, lengths: torch.Tensor, epsilon: float
) -> torch.Tensor:
    """Return `perturbation` (B, T, H), scaled down to norm `epsilon` where it is larger."""
    norms = sample_norms(perturbation, lengths).clamp(min=MIN_NORM)  # (B, T, 1)
    scale = (epsilon / norms).clamp(max=1.0)
    return perturbation * scale


def train_lane(
    adversary: Adversary | None,
    forward: Forward,
    backward: Backward,
    forward_for_gradient: Forward,
) -> torch.Tensor:
    """Run the passes of a lane, with or without an adversary; return its loss (), detached.

    Arguments as for `Adversary.run_lane`.
    """
    if adversary is not None:
        return adversary.run_lane(forward, backward, forward_for_gradient).detach()

    loss = forward()
    backward(loss, 1.0, True)
    return loss.detach()
