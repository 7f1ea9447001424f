"""Models that learn from the expected risk of given texts (Shen et al. 2016, arXiv:1512.02433).

Each row of a `RiskBatch` is a prompt and a text; rows of one sample make a group. Log-probabilities of whole texts come
from one forward; their shares within the group, sharpened by alpha, weigh the risks. The sum over groups leaves the
module, as with cross-entropy, which is still what plain batches (held-out ones, empty ones) get. Makes no texts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from typing_extensions import override

from dist_ft.config.sections.minimum_risk import RiskSection
from dist_ft.data.batch import IGNORE_INDEX, Batch
from dist_ft.model.causal_lm import CausalLM
from dist_ft.model.task_models import TaskModel
from dist_ft.model.trainable_model import Inputs


@dataclass(frozen=True, kw_only=True)
class RiskBatch(Batch):
    """Rows of a prompt and a text each.

    Attributes:
        risks: (R,) float32, of each row's text.
        groups: (R,) int64, from 0: the sample a row belongs to, whose first row is the reference.
    """

    risks: np.ndarray
    groups: np.ndarray


class RiskGroups:
    """Risks and groups of the rows of the forward under way, and what is made of them."""

    def __init__(self, batch: RiskBatch, device: torch.device | str) -> None:
        """Copy what is needed to `device`."""
        self.risks = torch.from_numpy(batch.risks).to(device)
        self.groups = torch.from_numpy(batch.groups).to(device)
        self.num_groups = int(batch.groups[-1]) + 1
        first = np.flatnonzero(np.diff(batch.groups, prepend=-1))
        self.references = torch.from_numpy(first).to(device)

    def loss(self, losses: torch.Tensor, rows: torch.Tensor, section: RiskSection) -> torch.Tensor:
        """Return the expected risk summed over groups, float32 ().

        Args:
            losses: (N,) cross-entropy of each token of the texts.
            rows: (N,) the row of each.
            section: alpha and the weight of the likelihood.
        """
        totals = torch.zeros_like(self.risks).index_add(0, rows, losses)
        found = expected_risk(-totals, self.risks, self.groups, self.num_groups, section.alpha)
        if section.likelihood_weight:
            sizes = torch.bincount(rows, minlength=len(totals)).clamp(min=1)
            found = found + section.likelihood_weight * (totals / sizes)[self.references].sum()
        return found


def expected_risk(
    log_probabilities: torch.Tensor,
    risks: torch.Tensor,
    groups: torch.Tensor,
    num_groups: int,
    alpha: float,
) -> torch.Tensor:
    """Return the sum over groups of sum(share x risk), shares being softmax(alpha x log-probability) within a group.

    Args:
        log_probabilities: (R,) of whole texts.
        risks: (R,).
        groups: (R,) int64 below `num_groups`.
        num_groups: how many there are.
        alpha: sharpness.
    """
    scaled = alpha * log_probabilities
    most = torch.full((num_groups,), -torch.inf, device=scaled.device)
    most = most.scatter_reduce(0, groups, scaled.detach(), "amax")
    powers = torch.exp(scaled - most[groups])
    sums = torch.zeros_like(most).index_add(0, groups, powers)
    return (powers / sums[groups] * risks).sum()


class _TakesTexts:
    """What both models share: a batch may bring texts, which the loss is then of."""

    _texts: RiskGroups | None = None

    def inputs(self, batch: Batch, device: torch.device | str) -> Inputs:
        """As the model's own; of a batch that brings texts, those too."""
        found = super().inputs(batch, device)  # type: ignore[misc]
        return {**found, "texts": RiskGroups(batch, device)} if isinstance(batch, RiskBatch) else found

    def forward(self, texts: RiskGroups | None = None, **given: Any) -> Any:
        """As the model's own; with `texts` the expected risk of the rows."""
        self._texts = texts
        try:
            return super().forward(**given)  # type: ignore[misc]
        finally:
            self._texts = None


class RiskCausalLM(_TakesTexts, CausalLM):  # type: ignore[misc]
    """A causal model that learns from expected risk where a batch brings texts."""

    def __init__(self, model: Any, section: RiskSection, neftune_alpha: float = 0.0) -> None:
        """Wrap `model`."""
        super().__init__(model, 0.0, neftune_alpha)
        self._section = section

    @override
    def _loss(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        positions: torch.Tensor,
        targets: torch.Tensor,
    ) -> torch.Tensor:
        if self._texts is None:
            return super()._loss(input_ids, position_ids, positions, targets)
        rows = positions // input_ids.shape[1]
        if self._flatten:
            input_ids, position_ids = input_ids.reshape(1, -1), position_ids.reshape(1, -1)
        logits = self._run(input_ids, position_ids, positions, None)
        losses = torch.nn.functional.cross_entropy(
            logits.reshape(-1, logits.shape[-1]).float(), targets, reduction="none"
        )
        return self._texts.loss(losses, rows, self._section)


class RiskSeq2Seq(_TakesTexts, TaskModel):  # type: ignore[misc]
    """An encoder-decoder that learns from expected risk where a batch brings texts."""

    def __init__(self, model: Any, task: Any, special: Any, section: RiskSection) -> None:
        """Wrap `model`."""
        super().__init__(model, task, special)
        self._section = section

    @override
    def _seq2seq(
        self, ids: Any, mask: Any, labels: Any, second: Any, second_mask: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self._texts is None:
            return super()._seq2seq(ids, mask, labels, second, second_mask)
        logits = self._seq2seq_logits(ids, mask, second, second_mask)
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), labels.flatten(), reduction="none", ignore_index=IGNORE_INDEX
        )
        rows = torch.arange(len(labels), device=labels.device)[:, None].expand_as(labels)
        counted = labels != IGNORE_INDEX
        return self._texts.loss(
            losses[counted.flatten()], rows[counted], self._section
        ), logits.argmax(-1)
