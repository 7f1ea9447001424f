"""What every model that learns has in common: batches become inputs, inputs a summed loss; names; noise."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dist_ft.data.batch import IGNORE_INDEX, Batch
from dist_ft.model.adapters import adalora, soft_prompts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Inputs = dict[str, Any]


class TrainableModel(nn.Module, ABC):
    """A transformers model whose forward returns the summed loss of a batch, float32 ()."""

    def __init__(self, model: PreTrainedModel, neftune_alpha: float = 0.0) -> None:
        """Wrap `model`; `neftune_alpha`: see `TuningSection`."""
        super().__init__()
        self.model = model
        self.virtual = soft_prompts.find_virtual_tokens(model)
        self.rank_schedule = adalora.find_rank_schedule(model)
        self._alpha = neftune_alpha
        if neftune_alpha:
            model.get_input_embeddings().register_forward_hook(self._add_noise)

    @abstractmethod
    def inputs(self, batch: Batch, device: torch.device | str) -> Inputs:
        """Return what `forward` takes, tensors on `device`."""

    def sample_length_at_positions(self, shape: torch.Size) -> torch.Tensor | None:
        """Return tokens of the sample at each place of the batch under way, (B, T) or (B, 1); None: none is."""
        return None

    def add_penalty(self, loss: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the summed loss with, in training, the model's penalty for each label: over a global batch, once."""
        if self.rank_schedule is None or not self.training:
            return loss
        return loss + self.rank_schedule.penalty() * (labels != IGNORE_INDEX).sum()

    def sample_lengths(self, shape: torch.Size) -> torch.Tensor:
        """Return the lengths (N,) of the samples of the batch under way, one after the other: they fill B*T places.

        Padding belongs to the sample of its row, or is one of its own.
        """
        return torch.full((shape[0],), shape[1], dtype=torch.long)

    def _add_noise(
        self, _embedding: nn.Module, _args: Any, output: torch.Tensor
    ) -> torch.Tensor | None:
        """Add NEFTune's noise to embeddings (B, T, H); each sample's own length bounds it."""
        sizes = self.sample_length_at_positions(output.shape) if self.training else None
        if sizes is None:
            return None
        noise = (
            torch.rand(output.shape, device=output.device) * 2 - 1
        )  # lanes are seeded: the same in every world
        return output + (noise * self._alpha / (sizes[..., None] * output.shape[-1]).sqrt()).to(
            output.dtype
        )


def parameters_by_name(module: TrainableModel) -> dict[str, nn.Parameter]:
    """Return the parameters by the name transformers gives them; tied weights appear once, under the first name."""
    return {name.removeprefix("model."): parameter for name, parameter in module.named_parameters()}


def tied_weight_aliases(module: TrainableModel) -> dict[str, str]:
    """Return {other name: first name} of tied weights."""
    first = {id(parameter): name for name, parameter in parameters_by_name(module).items()}
    every = module.named_parameters(remove_duplicate=False)
    return {
        name.removeprefix("model."): first[id(parameter)]
        for name, parameter in every
        if first[id(parameter)] != name.removeprefix("model.")
    }
