"""What is minimised: next-token cross-entropy, summed over the target tokens.

The sum (not the mean) leaves the module, so that the trainer can divide by the target tokens of the whole global
batch: accumulation, packing and the number of workers then leave the gradient unchanged. Logits are computed only at
positions with a target: prompts and padding cost no vocabulary-wide product. Where the output layer is a plain matrix,
loss and logits are made together, chunk by chunk (`head_loss`); models that change their logits afterwards (scaling,
soft caps) are noticed in the first forward, by what they do to a 1.0, and take the way over whole logits.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from typing_extensions import override

from dist_ft.core.errors import ModelError
from dist_ft.data.batch import IGNORE_INDEX, Batch
from dist_ft.model.adapters import soft_prompts
from dist_ft.model.losses.head_loss import head_loss
from dist_ft.model.packed_attention import enable_packed_attention, sample_lengths
from dist_ft.model.trainable_model import Inputs, TrainableModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def batch_to_inputs(batch: Batch, device: torch.device | str) -> Inputs:
    """Return what `CausalLM.forward` takes, tensors on `device`; what it must know is found on the host, unsynced."""
    targets = torch.from_numpy(batch.target_ids).reshape(-1)
    keep = torch.nonzero(targets != IGNORE_INDEX).reshape(-1)
    if len(keep) == 0:
        keep = torch.zeros(
            1, dtype=torch.long
        )  # one ignored position: weight zero, and every rank has a backward
    tensors = {
        "input_ids": torch.from_numpy(batch.input_ids),
        "position_ids": torch.from_numpy(batch.position_ids),
        "positions": keep,
        "targets": targets[keep],
    }
    return {
        **{name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()},
        "lengths": sample_lengths(batch.position_ids),
    }


class CausalLM(TrainableModel):
    """A transformers causal model whose forward returns the summed loss of a batch."""

    def __init__(
        self, model: PreTrainedModel, label_smoothing: float = 0.0, neftune_alpha: float = 0.0
    ) -> None:
        """Wrap `model`; smoothing and noise (see `TuningSection`) are for training, `eval` leaves them out."""
        super().__init__(model, neftune_alpha)
        self._smoothing = label_smoothing
        self._lengths: Sequence[Sequence[int]] | None = None
        self._positions: torch.Tensor | None = None
        self._targets: torch.Tensor | None = None
        self._samples = enable_packed_attention(model)
        self._flatten = str(model.config._attn_implementation).startswith("flash")
        head = model.get_output_embeddings()
        if head is None:
            raise ModelError(
                f"model of type {model.config.model_type}: it has no output embeddings to compute logits "
                "with; causal language models are allowed; choose another model"
            )
        head.register_forward_pre_hook(self._select)
        self._chunked = type(head) is nn.Linear and head.bias is None
        self._checked = False
        if self._chunked:
            self._plain_head = head.forward
            head.forward = functools.partial(self._head, head)

    def _select(self, _head: nn.Module, args: tuple[torch.Tensor, ...]) -> Any:
        """Hand the head only the hidden states (1, N, H) at the chosen positions of (B, T, H)."""
        if self._positions is None:
            return None
        hidden = args[0]
        return (hidden.reshape(1, -1, hidden.shape[-1])[:, self._positions], *args[1:])

    @override
    def inputs(self, batch: Batch, device: torch.device | str) -> Inputs:
        ids = self.virtual.ids if self.virtual is not None else ()
        return batch_to_inputs(soft_prompts.insert_virtual_tokens(batch, ids) if ids else batch, device)

    @override
    def sample_length_at_positions(self, shape: torch.Size) -> torch.Tensor | None:
        if self._lengths is None:
            return None
        sizes = torch.tensor(
            [size for row in self._lengths for size in row], device=self.model.device
        )
        return torch.repeat_interleave(sizes, sizes).reshape(shape[:2])

    @override
    def sample_lengths(self, shape: torch.Size) -> torch.Tensor:
        if self._lengths is None:
            return super().sample_lengths(shape)
        return torch.tensor([size for row in self._lengths for size in row])

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        positions: torch.Tensor,
        targets: torch.Tensor,
        lengths: Sequence[Sequence[int]],
    ) -> torch.Tensor:
        """Return the loss summed over targets, float32 ().

        Args:
            input_ids: (B, T) token ids.
            position_ids: (B, T); a restart at 0 begins another sample, which attention keeps apart
                (`use_cache=False` is what makes transformers see it).
            positions: (N,) indices into B*T of the positions to learn.
            targets: (N,) token ids to predict there, or IGNORED.
            lengths: by row, of the samples in it, as position_ids say.
        """
        self._lengths = lengths
        try:
            with self._samples.told(lengths) if self._samples is not None else nullcontext():
                return self.add_penalty(
                    self._loss(input_ids, position_ids, positions, targets), targets
                )
        finally:
            self._lengths = None

    def _loss(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        positions: torch.Tensor,
        targets: torch.Tensor,
    ) -> torch.Tensor:
        if self._flatten:  # flash attention finds packed samples in one flat row only
            input_ids, position_ids = input_ids.reshape(1, -1), position_ids.reshape(1, -1)
        if self._chunked:
            loss, one = self._run(input_ids, position_ids, positions, targets).reshape(2)
            if not self._checked:  # the same answer on every rank: it depends on the model only
                self._chunked, self._checked = one.item() == 1.0, True
            if self._chunked:
                return loss
        logits = self._run(input_ids, position_ids, positions, None)
        return nn.functional.cross_entropy(
            logits.reshape(-1, logits.shape[-1]).float(),
            targets,
            ignore_index=IGNORE_INDEX,
            reduction="sum",
            label_smoothing=self._smoothing if self.training else 0.0,
        )

    def _run(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        positions: torch.Tensor,
        targets: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return what the model calls logits: logits, or with `targets` loss and 1.0, (1, 1, 2), in their place."""
        self._positions, self._targets = positions, targets
        try:
            return self.model(
                input_ids=input_ids, position_ids=position_ids, use_cache=False
            ).logits
        finally:
            self._positions = self._targets = None

    def _head(self, head: nn.Linear, hidden: torch.Tensor) -> torch.Tensor:
        """Be the output layer's forward: the loss while `forward` runs, logits for everybody else.

        Inside the layer's own call, so that ZeRO-3 has its weight at hand.
        """
        if self._targets is None:
            return self._plain_head(hidden)
        loss = head_loss(
            hidden.reshape(-1, hidden.shape[-1]),
            head.weight,
            self._targets,
            self._smoothing if self.training else 0.0,
        )
        return torch.stack([loss, torch.ones_like(loss)]).reshape(1, 1, 2)
