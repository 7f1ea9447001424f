"""The base class of all trained models: a batch becomes inputs, inputs become a summed loss.

Also adds NEFTune noise to input embeddings, and lists parameters by the names that checkpoints use.

Dimensions: B rows of a batch, T tokens of a row, H hidden size, N samples of a batch.
"""

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
"""Keyword arguments of a model's `forward`."""
WRAPPER_PREFIX = "model."
"""Prefix of parameter names inside `TrainableModel`; checkpoints leave it out."""


class TrainableModel(nn.Module, ABC):
    """A transformers model whose forward returns the summed loss of a batch, float32 ().

    Attributes:
        model: the transformers model.
        virtual: the model's virtual tokens, if any. Checkpoints list the parameters below this name
            as aliases, so it must not change.
        rank_schedule: the model's AdaLoRA schedule, if any.
    """

    def __init__(self, model: PreTrainedModel, neftune_alpha: float = 0.0) -> None:
        """Wrap `model`; `neftune_alpha`: see `TuningSection`."""
        super().__init__()
        self.model = model
        self.virtual = soft_prompts.find_virtual_tokens(model)
        self.rank_schedule = adalora.find_rank_schedule(model)
        self._neftune_alpha = neftune_alpha

        # A hook, because models embed tokens somewhere inside their own forward.
        if neftune_alpha:
            model.get_input_embeddings().register_forward_hook(self._add_noise)

    @abstractmethod
    def prepare_inputs(self, batch: Batch, device: torch.device | str) -> Inputs:
        """Return the arguments of `forward` for `batch`, tensors on `device`."""

    def sample_length_at_positions(self, shape: torch.Size) -> torch.Tensor | None:
        """Return the length of the sample at each position of the current batch, (B, T) or (B, 1).

        None if no forward is running, or if its sample lengths are not defined.
        """
        return None

    def sample_lengths(self, shape: torch.Size) -> torch.Tensor:
        """Return the lengths (N,) of the samples of the current batch in order; they sum to B*T.

        Padding belongs to the sample of its row, or counts as a sample of its own.
        """
        num_rows, num_tokens = shape[0], shape[1]
        return torch.full((num_rows,), num_tokens, dtype=torch.long)

    def add_penalty(self, loss: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the summed loss; in training plus the AdaLoRA penalty times the number of labels.

        The trainer divides by the labels of the global batch, so the penalty counts once a step.
        """
        if self.rank_schedule is None or not self.training:
            return loss

        num_labels = (labels != IGNORE_INDEX).sum()
        return loss + self.rank_schedule.penalty() * num_labels

    def _add_noise(
        self, _embedding: nn.Module, _args: Any, output: torch.Tensor
    ) -> torch.Tensor | None:
        """Add NEFTune noise (arXiv:2310.05914) to embeddings (B, T, H), scaled by sample length."""
        if not self.training:
            return None
        lengths = self.sample_length_at_positions(output.shape)
        if lengths is None:
            return None

        # Lanes are seeded, so the draw is the same in every world.
        noise = torch.rand(output.shape, device=output.device) * 2 - 1  # (B, T, H), uniform
        scale = (lengths[..., None] * output.shape[-1]).sqrt()  # (B, T, 1) or (B, 1, 1)

        # Scaled in float32; only the result is rounded to the model's dtype.
        noise = noise * self._neftune_alpha / scale
        return output + noise.to(output.dtype)


def parameters_by_name(module: TrainableModel) -> dict[str, nn.Parameter]:
    """Return the parameters by the names transformers gives them.

    Tied weights appear once, under their first name.
    """
    return {
        name.removeprefix(WRAPPER_PREFIX): parameter
        for name, parameter in module.named_parameters()
    }


def tied_weight_aliases(module: TrainableModel) -> dict[str, str]:
    """Return {other name: first name} of tied weights."""
    first_names = {id(parameter): name for name, parameter in parameters_by_name(module).items()}

    aliases = {}
    for full_name, parameter in module.named_parameters(remove_duplicate=False):
        name = full_name.removeprefix(WRAPPER_PREFIX)
        first_name = first_names[id(parameter)]
        if name != first_name:
            aliases[name] = first_name
    return aliases
