"""Losses as sums: over samples or tokens of a micro-batch, which the trainer divides by those of the global batch.

Positions labelled `IGNORED` count nothing, and give every weight a gradient of zero. All float32.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from dist_ft.data.batch import IGNORE_INDEX

MIN_FOCAL_BASE = 1e-6
"""Of what a focal loss is scaled by: below it the slope of its power has no number."""


def cross_entropy(
    logits: torch.Tensor,
    targets: torch.Tensor,
    weights: torch.Tensor | None = None,
    gamma: float = 0.0,
    smoothing: float = 0.0,
) -> torch.Tensor:
    """Return the cross-entropy of logits (N, K) to targets (N,), summed.

    Args:
        logits: (N, K).
        targets: (N,) int64, or IGNORED.
        weights: (K,) what a sample of each label counts; none: 1.
        gamma: power of the focal loss (arXiv:1708.02002); 0: plain.
        smoothing: share of a target's probability that is spread evenly (arXiv:1512.00567).
    """
    losses = functional.cross_entropy(
        logits.float(), targets, ignore_index=IGNORE_INDEX, reduction="none", label_smoothing=smoothing
    )
    safe = targets.clamp(min=0)
    if gamma:
        shares = torch.softmax(logits.float(), -1).gather(-1, safe[:, None])[:, 0]
        losses = losses * (1 - shares).clamp(min=MIN_FOCAL_BASE) ** gamma
    if weights is not None:
        losses = losses * weights[safe]
    return losses.sum()


def binary_cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, counted: torch.Tensor, gamma: float = 0.0
) -> torch.Tensor:
    """Return, summed over rows, the mean over labels of the binary cross-entropy of logits (N, K) to 0 or 1 (N, K).

    `counted` (N,) is 0 for rows that count nothing; `gamma` as in `cross_entropy`.
    """
    losses = functional.binary_cross_entropy_with_logits(
        logits.float(), targets.float(), reduction="none"
    )
    if gamma:
        losses = (
            losses * (-torch.expm1(-losses)).clamp(min=MIN_FOCAL_BASE) ** gamma
        )  # exp(-loss): how probable what is so
    return (losses.mean(-1) * counted).sum()


def squared_error(
    values: torch.Tensor, targets: torch.Tensor, counted: torch.Tensor
) -> torch.Tensor:
    """Return the squared error of values (N,) to targets (N,), summed over rows with `counted` (N,) 1."""
    return ((values.float() - targets.float()) ** 2 * counted).sum()


def contrastive(
    first: torch.Tensor, second: torch.Tensor, counted: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Return InfoNCE (arXiv:1807.03748), both ways, of vectors (N, H): rows i belong together; summed over rows.

    Every row is told from all others; rows with `counted` (N,) 0 themselves count nothing.
    """
    cosines = (
        functional.normalize(first.float(), dim=-1)
        @ functional.normalize(second.float(), dim=-1).T
        / temperature
    )
    targets = torch.where(counted.bool(), torch.arange(len(first), device=first.device), IGNORE_INDEX)
    return (cross_entropy(cosines, targets) + cross_entropy(cosines.T, targets)) / 2
