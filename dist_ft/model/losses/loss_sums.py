"""Losses as sums over the samples or tokens of a micro-batch, float32.

The trainer divides by the samples or tokens of the global batch. Positions labeled `IGNORE_INDEX`
add nothing, and give every weight a gradient of zero.

Dimensions: N samples or tokens, K labels or vocabulary size, H width of a vector.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from dist_ft.data.batch import IGNORE_INDEX

MIN_FOCAL_BASE = 1e-6
"""Minimum of 1 - probability in a focal loss; below it the derivative is not finite."""


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
        targets: (N,) int64, or `IGNORE_INDEX`.
        weights: (K,) weight of a sample of each label; None: 1.
        gamma: power of the focal loss (arXiv:1708.02002); 0: plain.
        smoothing: share of a target's probability that is spread evenly (arXiv:1512.00567).
    """
    losses = functional.cross_entropy(
        logits.float(),
        targets,
        ignore_index=IGNORE_INDEX,
        reduction="none",
        label_smoothing=smoothing,
    )

    # `IGNORE_INDEX` is negative and cannot be looked up; the loss of its rows is zero already.
    valid_targets = targets.clamp(min=0)

    if gamma:
        probabilities = torch.softmax(logits.float(), -1)
        target_probabilities = probabilities.gather(-1, valid_targets[:, None])[:, 0]
        losses = losses * (1 - target_probabilities).clamp(min=MIN_FOCAL_BASE) ** gamma

    # torch's own `weight` would also scale the smoothed part by the weights of other labels.
    if weights is not None:
        losses = losses * weights[valid_targets]
    return losses.sum()


def binary_cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, row_weights: torch.Tensor, gamma: float = 0.0
) -> torch.Tensor:
    """Return the binary cross-entropy, mean over labels and summed over rows.

    Args:
        logits: (N, K).
        targets: (N, K), 0 or 1.
        row_weights: (N,), 0 for rows that are ignored.
        gamma: see `cross_entropy`.
    """
    losses = functional.binary_cross_entropy_with_logits(
        logits.float(), targets.float(), reduction="none"
    )
    if gamma:
        # exp(-loss) is the probability of the target; expm1 is exact where that is close to 1.
        losses = losses * (-torch.expm1(-losses)).clamp(min=MIN_FOCAL_BASE) ** gamma

    return (losses.mean(-1) * row_weights).sum()


def squared_error(
    values: torch.Tensor, targets: torch.Tensor, row_weights: torch.Tensor
) -> torch.Tensor:
    """Return the squared errors of values (N,), times `row_weights` (N,), summed."""
    return ((values.float() - targets.float()) ** 2 * row_weights).sum()


def contrastive(
    first: torch.Tensor, second: torch.Tensor, is_counted: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Return InfoNCE (arXiv:1807.03748) in both directions, summed over rows.

    Every row is a negative example for all others, ignored rows included.

    Args:
        first, second: (N, H) vectors; rows i form a positive pair.
        is_counted: (N,), 0 for rows whose own loss is ignored.
        temperature: divides the cosines.
    """
    first = functional.normalize(first.float(), dim=-1)
    second = functional.normalize(second.float(), dim=-1)
    cosines = first @ second.T / temperature  # (N, N)

    # Row i must choose column i; the other columns are its negative examples.
    own_rows = torch.arange(len(first), device=first.device)
    targets = torch.where(is_counted.bool(), own_rows, IGNORE_INDEX)

    # The mean of both directions, so that each pair counts once.
    return (cross_entropy(cosines, targets) + cross_entropy(cosines.T, targets)) / 2
