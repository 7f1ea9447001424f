"""Classes by examples: a text is what the nearest mean vector of examples says, by cosine; nothing is learned.

Prototypical classification (Snell et al., arXiv:1703.05175) with the vectors of an encoder as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional
from typing_extensions import override

from dist_ft.model.losses import loss_sums
from dist_ft.model.task_models import TaskModel, pool_hidden_states

COSINE_SCALE = 20.0
"""Cosines are multiplied by it to be told as logits, as sentence encoders are trained with."""


class PrototypeModel(TaskModel):
    """A transformers model without a head, and a vector for each label.

    Attributes:
        prototypes: (K, H), of length 1; none before `learn_from`.
    """

    prototypes: torch.Tensor | None = None

    def fit_prototypes(self, vectors: torch.Tensor, labels: torch.Tensor, num_labels: int) -> None:
        """Take the mean of vectors (N, H) of each label, (N,), as its prototype; every label must have one."""
        sums = torch.zeros(num_labels, vectors.shape[1]).index_add_(0, labels, vectors)
        self.prototypes = functional.normalize(sums, dim=1)

    def vectors(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return the vectors (B, H), float32 and of length 1, of texts (B, T)."""
        hidden = self._run(ids, mask).last_hidden_state.float()
        return functional.normalize(pool_hidden_states(hidden, mask, self._task.pooling), dim=1)

    @override
    def _sequence_classification(
        self, ids: Any, mask: Any, labels: Any, *_: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.prototypes is not None
        logits = COSINE_SCALE * self.vectors(ids, mask) @ self.prototypes.to(ids.device).T
        return loss_sums.cross_entropy(logits, labels[:, 0]), logits
