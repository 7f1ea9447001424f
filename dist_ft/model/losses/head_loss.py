"""The output layer and its cross-entropy in one, chunk by chunk: the logits of a whole batch never exist.

For each chunk of positions the logits, the loss and the gradients of both operands are made at once, so backward only
scales what is there: three matrix products in all, as without chunks, and memory for a chunk in place of several times
the batch's logits. (The idea of computing gradients in forward: Liger Kernel, arXiv:2410.10989.)
"""

from __future__ import annotations

from typing import Any

import torch

from dist_ft.data.batch import IGNORE_INDEX

CHUNK_BYTES = 2**27
"""Of float32 logits at once: large enough for full-speed matrix products, small beside a model."""


def head_loss(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, smoothing: float = 0.0
) -> torch.Tensor:
    """Return the cross-entropy of `hidden @ weight.T` summed over targets, float32 ().

    Args:
        hidden: (N, H).
        weight: (V, H), of the same dtype.
        targets: (N,) ids below V, or IGNORED.
        smoothing: share of a target's probability that is spread evenly over all V.
    """
    return _HeadLoss.apply(hidden, weight, targets, smoothing)


class _HeadLoss(torch.autograd.Function):
    """Gradients are those of the sum; backward multiplies them by what comes from above."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        smoothing: float,
    ) -> torch.Tensor:
        want_hidden, want_weight, *_ = ctx.needs_input_grad
        rows = max(1, CHUNK_BYTES // (4 * len(weight)))
        keep = targets != IGNORE_INDEX
        safe = torch.where(keep, targets, 0)[:, None]
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if want_hidden else None
        grad_weight: torch.Tensor | None = None
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            logits = (hidden[part] @ weight.t()).float()
            chosen, largest = logits.gather(1, safe[part])[:, 0], logits.amax(1)
            if smoothing:
                chosen = torch.lerp(chosen, logits.mean(1), smoothing)
            # in place: fresh memory costs more than the softmax; every element is read before it is written
            shares = torch.softmax(logits, 1, out=logits if logits.device.type == "cpu" else None)
            del logits
            # of the largest logit the share is 1 / sum(exp(logit - largest)), which never underflows
            losses = largest - shares.amax(1).log() - chosen
            loss += torch.where(keep[part], losses, 0.0).sum()
            if not (want_hidden or want_weight):
                continue
            shares.scatter_add_(1, safe[part], torch.full_like(shares[:, :1], smoothing - 1.0))
            if smoothing:
                shares -= smoothing / len(weight)
            slope, mask = shares.to(weight.dtype), keep[part, None]
            if grad_hidden is not None:
                torch.mm(slope, weight, out=grad_hidden[part])
                grad_hidden[part].mul_(mask)
            if want_weight:
                grad_weight = _add_product(
                    grad_weight, slope, hidden[part] * mask, rows < len(hidden)
                )
        ctx.save_for_backward(
            grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype)
        )
        return loss

    @staticmethod
    def backward(
        ctx: Any, *grads: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        (scale,) = grads
        return (
            None if grad_hidden is None else grad_hidden.mul_(scale.to(grad_hidden.dtype)),
            None if grad_weight is None else grad_weight.mul_(scale.to(grad_weight.dtype)),
            None,
            None,
        )


def _add_product(
    total: torch.Tensor | None, slope: torch.Tensor, hidden: torch.Tensor, more: bool
) -> torch.Tensor:
    """Return total + slope.T @ hidden; of several products the sum is kept in float32."""
    if total is None:
        product = slope.t() @ hidden
        return product.float() if more else product
    if slope.dtype == torch.float32:
        return total.addmm_(slope.t(), hidden)
    return total.add_(slope.t() @ hidden)
