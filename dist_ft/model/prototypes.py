"""Classification by prototypes: a text gets the label whose examples' mean vector is nearest.

Distance is by cosine. Nothing is trained. Prototypical classification (Snell et al.,
arXiv:1703.05175) with the vectors of an encoder as they are.

Dimensions: B rows of a batch, T tokens of a row, H hidden size, K labels, N examples.
"""

from __future__ import annotations

import torch
from torch.nn import functional
from typing_extensions import override

from dist_ft.model.losses import loss_sums
from dist_ft.model.model_task import LossAndOutputs, TaskInputs
from dist_ft.model.task_models import TaskModel, pool_hidden_states

COSINE_SCALE = 20.0
"""Factor from cosines to logits, as in the training of sentence encoders."""


class PrototypeModel(TaskModel):
    """A transformers model without a head, and a vector for each label.

    Attributes:
        prototypes: (K, H), of length 1; None before `fit_prototypes`.
    """

    prototypes: torch.Tensor | None = None

    def fit_prototypes(self, vectors: torch.Tensor, labels: torch.Tensor, num_labels: int) -> None:
        """Set each prototype to the mean direction of its label's examples.

        Args:
            vectors: (N, H) of examples.
            labels: (N,) int64; every label must occur.
            num_labels: K.
        """
        # A sum has the direction of the mean, and only the direction remains.
        sums = torch.zeros(num_labels, vectors.shape[1]).index_add_(0, labels, vectors)
        self.prototypes = functional.normalize(sums, dim=1)

    def embed(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return the vectors (B, H), float32 and of length 1, of texts (B, T)."""
        hidden = self.run_model(ids, mask).last_hidden_state.float()  # (B, T, H)
        pooled = pool_hidden_states(hidden, mask, self._task.section.pooling)  # (B, H)
        return functional.normalize(pooled, dim=1)

    @override
    def compute_loss(self, inputs: TaskInputs) -> LossAndOutputs:
        assert self.prototypes is not None
        prototypes = self.prototypes.to(inputs.ids.device)

        # Both have length 1, so the products are cosines.
        logits = COSINE_SCALE * self.embed(inputs.ids, inputs.mask) @ prototypes.T  # (B, K)
        return LossAndOutputs(loss_sums.cross_entropy(logits, inputs.labels[:, 0]), logits)
