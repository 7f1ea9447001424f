"""The output layer and its cross-entropy in one function, chunk by chunk.

The logits of a whole batch never exist. For each chunk of positions the logits, the loss and the
gradients of both operands are computed at once, so backward only scales the stored gradients: three
matrix products in all, as without chunks, and memory for one chunk instead of several times the
batch's logits. (The idea of computing gradients in forward: Liger Kernel, arXiv:2410.10989.)

Dimensions: N positions, H hidden size, V vocabulary size, C positions of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch

from dist_ft.data.batch import IGNORE_INDEX

CHUNK_BYTES = 2**27
"""Bytes of float32 logits at once: enough for full-speed matrix products, small next to a model."""


def head_loss(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, smoothing: float = 0.0
) -> torch.Tensor:
    """Return the cross-entropy of `hidden @ weight.T` summed over targets, float32 ().

    Args:
        hidden: (N, H).
        weight: (V, H), of the same dtype.
        targets: (N,) ids below V, or `IGNORE_INDEX`.
        smoothing: share of a target's probability that is spread evenly over all V.
    """
    return _HeadLoss.apply(hidden, weight, targets, smoothing)


class _HeadLoss(torch.autograd.Function):
    """Forward computes the gradients of the sum; backward scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        smoothing: float,
    ) -> torch.Tensor:
        # Without gradients (evaluation, a frozen output layer) their products are not computed.
        needs_hidden_grad, needs_weight_grad, *_ = ctx.needs_input_grad
        chunk_size = max(1, CHUNK_BYTES // (4 * len(weight)))
        is_target = targets != IGNORE_INDEX
        valid_targets = torch.where(is_target, targets, 0)[:, None]  # (N, 1)

        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_hidden_grad else None
        grad_weight: torch.Tensor | None = None

        for start in range(0, len(hidden), chunk_size):
            chunk = slice(start, start + chunk_size)
            logits = (hidden[chunk] @ weight.t()).float()  # (C, V)
            target_logits = logits.gather(1, valid_targets[chunk])[:, 0]  # (C,)
            largest = logits.amax(1)  # (C,)
            if smoothing:
                target_logits = torch.lerp(target_logits, logits.mean(1), smoothing)

            # In place on CPUs: fresh memory costs more than the softmax, and every element is read
            # before it is written.
            out = logits if logits.device.type == "cpu" else None
            probabilities = torch.softmax(logits, 1, out=out)
            del logits, out

            # The largest logit has probability 1 / sum(exp(logit - largest)), which never
            # underflows.
            losses = largest - probabilities.amax(1).log() - target_logits
            loss += torch.where(is_target[chunk], losses, 0.0).sum()
            if not (needs_hidden_grad or needs_weight_grad):
                continue

            # The gradient of the logits, (C, V): the probabilities, in their memory, minus the
            # target distribution.
            probabilities.scatter_add_(
                1, valid_targets[chunk], torch.full_like(probabilities[:, :1], smoothing - 1.0)
            )
            if smoothing:
                probabilities -= smoothing / len(weight)
            grad_logits = probabilities.to(weight.dtype)

            # Masking (C, H) costs less than masking (C, V).
            mask = is_target[chunk, None]  # (C, 1)
            if grad_hidden is not None:
                torch.mm(grad_logits, weight, out=grad_hidden[chunk])
                grad_hidden[chunk].mul_(mask)
            if needs_weight_grad:
                # The masked copy has no name, so it is freed before the next chunk's logits exist.
                has_more_chunks = chunk_size < len(hidden)
                grad_weight = _add_product(
                    grad_weight, grad_logits, hidden[chunk] * mask, has_more_chunks
                )

        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        ctx.save_for_backward(grad_hidden, grad_weight)
        return loss

    @staticmethod
    def backward(
        ctx: Any, *grads: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        (scale,) = grads

        # In place: these tensors are used once, and the gradient of a large output layer is large.
        if grad_hidden is not None:
            grad_hidden = grad_hidden.mul_(scale.to(grad_hidden.dtype))
        if grad_weight is not None:
            grad_weight = grad_weight.mul_(scale.to(grad_weight.dtype))
        return grad_hidden, grad_weight, None, None


def _add_product(
    total: torch.Tensor | None,
    grad_logits: torch.Tensor,
    hidden: torch.Tensor,
    has_more_chunks: bool,
) -> torch.Tensor:
    """Return total + grad_logits.T @ hidden, (V, H); the sum of several products is in float32."""
    if total is None:
        product = grad_logits.t() @ hidden
        return product.float() if has_more_chunks else product

    # `addmm_` needs one dtype. A 16-bit product is computed first, then added in float32.
    if grad_logits.dtype == torch.float32:
        return total.addmm_(grad_logits.t(), hidden)
    return total.add_(grad_logits.t() @ hidden)
