"""Causal language modeling: next-token cross-entropy, summed over the target tokens.

The module returns the sum (not the mean), so that the trainer can divide by the target tokens of
the whole global batch: accumulation, packing and the number of workers then leave the gradient
unchanged. Logits are computed only at positions with a target, so prompts and padding cost no
vocabulary-wide product. If the output layer is a plain matrix, loss and logits are computed
together, chunk by chunk (`head_loss`). Models that change their logits afterwards (scaling, soft
caps) are detected in the first forward, because they change a marker value of 1.0; their loss is
computed from whole logits instead.

Dimensions: B rows of a batch, T tokens of a row, H hidden size, V vocabulary size, N target tokens
of a batch.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
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
    """Return the arguments of `CausalLM.forward`, tensors on `device`.

    Shapes that depend on the data are computed on the host, so that no device has to synchronize.
    """
    targets = torch.from_numpy(batch.target_ids).reshape(-1)  # (B*T,)
    target_positions = torch.nonzero(targets != IGNORE_INDEX).reshape(-1)  # (N,)
    if len(target_positions) == 0:
        # One ignored position: its weight is zero, and every rank has a backward pass.
        target_positions = torch.zeros(1, dtype=torch.long)

    tensors = {
        "input_ids": torch.from_numpy(batch.input_ids),
        "position_ids": torch.from_numpy(batch.position_ids),
        "target_positions": target_positions,
        "targets": targets[target_positions],
    }
    on_device = {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}
    return {**on_device, "lengths": sample_lengths(batch.position_ids)}


class CausalLM(TrainableModel):
    """A transformers causal model whose forward returns the summed loss of a batch."""

    def __init__(
        self, model: PreTrainedModel, label_smoothing: float = 0.0, neftune_alpha: float = 0.0
    ) -> None:
        """Wrap `model`; smoothing and noise (see `TuningSection`) apply in training only.

        Raises:
            ModelError: the model has no output layer.
        """
        super().__init__(model, neftune_alpha)
        self._smoothing = label_smoothing
        self._packed_samples = enable_packed_attention(model)
        self._flatten_rows = str(model.config._attn_implementation).startswith("flash")

        # Arguments of the current forward, which hooks read.
        self._lengths: Sequence[Sequence[int]] | None = None
        self._target_positions: torch.Tensor | None = None
        self._targets: torch.Tensor | None = None

        head = model.get_output_embeddings()
        if head is None:
            raise ModelError(
                f"model of type {model.config.model_type}: it has no output embeddings to compute "
                "logits with. Only causal language models are allowed. Choose another model."
            )
        head.register_forward_pre_hook(self._select_target_positions)

        # Chunked until the first forward shows that the model changes its logits.
        self._use_chunked_loss = type(head) is nn.Linear and head.bias is None
        self._is_chunked_loss_checked = False
        if self._use_chunked_loss:
            # On the instance, so that the layer keeps its class, its name and its hooks.
            self._head_forward = head.forward
            head.forward = functools.partial(self._loss_or_logits, head)

    def _select_target_positions(self, _head: nn.Module, args: tuple[torch.Tensor, ...]) -> Any:
        """Pass to the head only the hidden states (1, N, H) at target positions of (B, T, H)."""
        if self._target_positions is None:
            return None
        hidden = args[0]
        selected = hidden.reshape(1, -1, hidden.shape[-1])[:, self._target_positions]
        return (selected, *args[1:])

    @override
    def prepare_inputs(self, batch: Batch, device: torch.device | str) -> Inputs:
        if self.virtual is not None and self.virtual.ids:
            batch = soft_prompts.insert_virtual_tokens(batch, self.virtual.ids)
        return batch_to_inputs(batch, device)

    @override
    def sample_length_at_positions(self, shape: torch.Size) -> torch.Tensor | None:
        if self._lengths is None:
            return None
        lengths = self.sample_lengths(shape).to(self.model.device)  # (number of samples,)
        return torch.repeat_interleave(lengths, lengths).reshape(shape[:2])

    @override
    def sample_lengths(self, shape: torch.Size) -> torch.Tensor:
        if self._lengths is None:
            return super().sample_lengths(shape)
        return torch.tensor([length for row in self._lengths for length in row])

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        target_positions: torch.Tensor,
        targets: torch.Tensor,
        lengths: Sequence[Sequence[int]],
    ) -> torch.Tensor:
        """Return the loss summed over targets, float32 ().

        Args:
            input_ids: (B, T) token ids.
            position_ids: (B, T); a restart at 0 starts another sample, which attention keeps
                separate (transformers detects it only with `use_cache=False`).
            target_positions: (N,) indices into B*T of the positions with a target.
            targets: (N,) token ids to predict there, or `IGNORE_INDEX`.
            lengths: for each row, the lengths of its samples, consistent with `position_ids`.
        """
        self._lengths = lengths
        packing: AbstractContextManager[None] = nullcontext()
        if self._packed_samples is not None:
            packing = self._packed_samples.use(lengths)

        try:
            with packing:
                loss = self._loss(input_ids, position_ids, target_positions, targets)
                return self.add_penalty(loss, targets)
        finally:
            # Generation calls the same model, and its rows are not packed.
            self._lengths = None

    def _loss(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        target_positions: torch.Tensor,
        targets: torch.Tensor,
    ) -> torch.Tensor:
        """Return the cross-entropy summed over targets, float32 (); arguments as `forward`."""
        if self._flatten_rows:
            # Flash attention separates packed samples in one flat row only.
            input_ids = input_ids.reshape(1, -1)
            position_ids = position_ids.reshape(1, -1)

        if self._use_chunked_loss:
            output = self._run_model(input_ids, position_ids, target_positions, targets)
            loss, marker = output.reshape(2)
            if not self._is_chunked_loss_checked:
                # The result is the same on every rank: it depends on the model only.
                self._use_chunked_loss = marker.item() == 1.0
                self._is_chunked_loss_checked = True
            if self._use_chunked_loss:
                return loss

        # Also right after a failed check: that forward's loss went through the model's own change.
        logits = self._run_model(input_ids, position_ids, target_positions, None)  # (1, N, V)
        return nn.functional.cross_entropy(
            logits.reshape(-1, logits.shape[-1]).float(),
            targets,
            ignore_index=IGNORE_INDEX,
            reduction="sum",
            label_smoothing=self._smoothing if self.training else 0.0,
        )

    def _run_model(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        target_positions: torch.Tensor,
        targets: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return the logits (1, N, V), or with `targets` the loss and the marker 1.0, (1, 1, 2)."""
        # Hooks read these: the transformers model has no arguments for them.
        self._target_positions, self._targets = target_positions, targets
        try:
            return self.model(
                input_ids=input_ids, position_ids=position_ids, use_cache=False
            ).logits
        finally:
            self._target_positions = self._targets = None

    def _loss_or_logits(self, head: nn.Linear, hidden: torch.Tensor) -> torch.Tensor:
        """Replace the output layer's forward: return the loss inside `forward`, logits otherwise.

        It runs inside the layer's own call, so that ZeRO-3 has gathered the layer's weight.
        """
        if self._targets is None:
            return self._head_forward(hidden)

        loss = head_loss(
            hidden.reshape(-1, hidden.shape[-1]),
            head.weight,
            self._targets,
            self._smoothing if self.training else 0.0,
        )
        # The marker shows whether the model changes what the output layer returns. The shape has
        # the three dimensions of logits, which the model may rely on.
        marker = torch.ones_like(loss)
        return torch.stack([loss, marker]).reshape(1, 1, 2)
