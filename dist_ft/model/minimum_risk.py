"""Minimum risk training: minimize the expected risk of candidate texts.

Method: Shen et al. 2016, arXiv:1512.02433. Each row of a `RiskBatch` is a prompt and a candidate
text; the rows of one sample form a group. Log-probabilities of whole texts come from one forward;
their shares within the group, sharpened by alpha, weight the risks. The module returns the sum over
groups, as with cross-entropy. Plain batches (held-out ones, empty ones) still get cross-entropy.
Does not generate texts.

Dimensions: R rows, T tokens of a row (T2 of its target), N tokens of the texts, G groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from typing_extensions import override

from dist_ft.config.sections.task import RiskSection
from dist_ft.data.batch import IGNORE_INDEX, Batch
from dist_ft.model.causal_lm import CausalLM
from dist_ft.model.model_task import LossAndOutputs, TaskInputs
from dist_ft.model.task_models import TaskModel
from dist_ft.model.trainable_model import Inputs


@dataclass(frozen=True, kw_only=True)
class RiskBatch(Batch):
    """A batch whose rows are a prompt and a candidate text each.

    Attributes:
        risks: (R,) float32, risk of each row's text.
        groups: (R,) int64, from 0, ascending: the sample of a row. Its first row is the reference.
    """

    risks: np.ndarray
    groups: np.ndarray


class RiskGroups:
    """Risks and groups of the rows of the current forward, and the loss computed from them.

    Attributes:
        risks: (R,) float32.
        groups: (R,) int64.
        num_groups: G.
        references: (G,) int64, the first row of each group.
    """

    def __init__(self, batch: RiskBatch, device: torch.device | str) -> None:
        """Copy risks and groups to `device`."""
        self.risks = torch.from_numpy(batch.risks).to(device)
        self.groups = torch.from_numpy(batch.groups).to(device)

        # From the host's copy, so that the device need not synchronize.
        self.num_groups = int(batch.groups[-1]) + 1
        first_rows = np.flatnonzero(np.diff(batch.groups, prepend=-1))
        self.references = torch.from_numpy(first_rows).to(device)

    def loss(self, losses: torch.Tensor, rows: torch.Tensor, section: RiskSection) -> torch.Tensor:
        """Return the expected risk summed over groups, float32 ().

        Args:
            losses: (N,) cross-entropy of each token of the texts.
            rows: (N,) the row of each token.
            section: alpha and the weight of the likelihood.
        """
        row_losses = torch.zeros_like(self.risks).index_add(0, rows, losses)  # (R,)
        loss = expected_risk(-row_losses, self.risks, self.groups, self.num_groups, section.alpha)

        # The mean over tokens, so that long references do not weigh more than short ones.
        if section.likelihood_weight:
            num_tokens = torch.bincount(rows, minlength=len(row_losses)).clamp(min=1)  # (R,)
            reference_losses = (row_losses / num_tokens)[self.references]
            loss = loss + section.likelihood_weight * reference_losses.sum()
        return loss


def expected_risk(
    log_probabilities: torch.Tensor,
    risks: torch.Tensor,
    groups: torch.Tensor,
    num_groups: int,
    alpha: float,
) -> torch.Tensor:
    """Return the sum over groups of sum(share x risk), float32 ().

    Shares are softmax(alpha x log-probability) within a group.

    Args:
        log_probabilities: (R,) of whole texts.
        risks: (R,).
        groups: (R,) int64 below `num_groups`.
        num_groups: the number of groups, G.
        alpha: sharpness.
    """
    scaled = alpha * log_probabilities

    # A softmax within each group, from the differences to the group's largest: the powers of whole
    # texts' log-probabilities would underflow.
    largest = torch.full((num_groups,), -torch.inf, device=scaled.device)
    largest = largest.scatter_reduce(0, groups, scaled.detach(), "amax")  # (G,)
    powers = torch.exp(scaled - largest[groups])  # (R,)
    sums = torch.zeros_like(largest).index_add(0, groups, powers)  # (G,)

    shares = powers / sums[groups]  # (R,)
    return (shares * risks).sum()


class _RiskMixin:
    """Accept a `RiskBatch`: its groups define the loss of the forward."""

    _risk_groups: RiskGroups | None = None

    def prepare_inputs(self, batch: Batch, device: torch.device | str) -> Inputs:
        """Return the arguments of `forward`; for a `RiskBatch` also its groups."""
        inputs: Inputs = super().prepare_inputs(batch, device)  # type: ignore[misc]
        if isinstance(batch, RiskBatch):
            inputs = {**inputs, "risk_groups": RiskGroups(batch, device)}
        return inputs

    def forward(self, risk_groups: RiskGroups | None = None, **inputs: Any) -> Any:
        """Return what the model's own forward returns; with `risk_groups` the expected risk."""
        # Kept in an attribute, because the model's own forward does not pass it on to the loss.
        self._risk_groups = risk_groups
        try:
            return super().forward(**inputs)  # type: ignore[misc]
        finally:
            self._risk_groups = None


class RiskCausalLM(_RiskMixin, CausalLM):  # type: ignore[misc]
    """A causal model that minimizes expected risk on `RiskBatch`es."""

    def __init__(self, model: Any, section: RiskSection, neftune_alpha: float = 0.0) -> None:
        """Wrap `model`."""
        super().__init__(model, 0.0, neftune_alpha)
        self._section = section

    @override
    def _loss(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        target_positions: torch.Tensor,
        targets: torch.Tensor,
    ) -> torch.Tensor:
        if self._risk_groups is None:
            return super()._loss(input_ids, position_ids, target_positions, targets)

        # Before rows are flattened: positions count through the rows of (R, T).
        rows = target_positions // input_ids.shape[1]  # (N,)
        if self._flatten_rows:
            input_ids = input_ids.reshape(1, -1)
            position_ids = position_ids.reshape(1, -1)

        # Whole logits, not `head_loss`: the risk needs the loss of each token, not their sum.
        logits = self._run_model(input_ids, position_ids, target_positions, None)
        losses = torch.nn.functional.cross_entropy(
            logits.reshape(-1, logits.shape[-1]).float(), targets, reduction="none"
        )
        return self._risk_groups.loss(losses, rows, self._section)


class RiskSeq2Seq(_RiskMixin, TaskModel):  # type: ignore[misc]
    """An encoder-decoder that minimizes expected risk on `RiskBatch`es."""

    def __init__(self, model: Any, task: Any, special: Any, section: RiskSection) -> None:
        """Wrap `model`."""
        super().__init__(model, task, special)
        self._section = section

    @override
    def compute_loss(self, inputs: TaskInputs) -> LossAndOutputs:
        if self._risk_groups is None:
            return super().compute_loss(inputs)

        labels = inputs.labels  # (R, T2)
        logits = self.run_encoder_decoder(inputs)
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).float(),
            labels.flatten(),
            reduction="none",
            ignore_index=IGNORE_INDEX,
        )

        # From one loss per position of (R, T2) to those of the targets, (N,), with their rows.
        rows = torch.arange(len(labels), device=labels.device)[:, None].expand_as(labels)
        is_target = labels != IGNORE_INDEX
        target_losses = losses[is_target.flatten()]
        loss = self._risk_groups.loss(target_losses, rows[is_target], self._section)
        return LossAndOutputs(loss, logits.argmax(-1))
