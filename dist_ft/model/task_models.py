"""Models with a task head: a padded batch in, the summed loss and each row's outputs out.

Guarantees: no output depends on padding; a batch without labels gives loss zero and a gradient of
zero everywhere, so that every rank can make the same number of calls; the module returns the sum of
the loss (not the mean), as `causal_lm` does.

Dimensions: B rows of a batch, T tokens of a row (T1 and T2 of its first and second text), H hidden
size, V vocabulary size, K labels, N masked positions of a batch.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from typing_extensions import override

from dist_ft.config.sections.task import TaskSection
from dist_ft.data.batch import IGNORE_INDEX, Batch
from dist_ft.model.losses import loss_sums
from dist_ft.model.model_task import LossAndOutputs, TaskInputs, model_task
from dist_ft.model.trainable_model import Inputs, TrainableModel

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class SpecialTokens:
    """Special token ids that a model needs from its tokenizer.

    Attributes:
        pad: id of padding.
        separator: id between the texts of a pair, after which token types are 1; None: the model
            takes no token types.
    """

    pad: int
    separator: int | None = None

    @classmethod
    def from_tokenizer(cls, tokenizer: Any, config: PretrainedConfig) -> SpecialTokens:
        """Return the ids of a model and tokenizer; sets the config's pad token if it has none."""
        inner = config.get_text_config()
        if inner.pad_token_id is None:
            candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id)
            inner.pad_token_id = next((token for token in candidates if token is not None), 0)
            config.pad_token_id = inner.pad_token_id

        has_token_types = "token_type_ids" in tokenizer.model_input_names
        return cls(inner.pad_token_id, tokenizer.sep_token_id if has_token_types else None)


class TaskModel(TrainableModel):
    """A transformers model with the head of a task."""

    def __init__(
        self,
        model: PreTrainedModel,
        task: TaskSection,
        special: SpecialTokens,
        label_smoothing: float = 0.0,
        neftune_alpha: float = 0.0,
    ) -> None:
        """Wrap `model`; smoothing and noise apply in training only.

        Raises:
            ModelError: the model's config lacks something that the task needs.
        """
        super().__init__(model, neftune_alpha)
        self._task = model_task(task)
        self._special = special
        self._smoothing = label_smoothing
        self._class_weights: torch.Tensor | None = None
        if task.class_weights:
            self._class_weights = torch.tensor(task.class_weights)
        self._row_lengths: torch.Tensor | None = None  # (B, 1), of the current forward
        self._positions: torch.Tensor | None = None  # (N,), of the current forward
        self._takes_use_cache = "use_cache" in inspect.signature(model.forward).parameters
        self._task.check_model_config(model.config)
        if self._task.masks_tokens:
            model.get_output_embeddings().register_forward_pre_hook(self._select_positions)
        self._takes_token_types = (
            special.separator is not None and getattr(model.config, "type_vocab_size", 0) > 1
        )

    def _select_positions(self, _head: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> Any:
        """Pass to the output layer only the hidden states at `_positions`, (1, N, H)."""
        if self._positions is None:
            return None
        hidden = args[0]
        selected = hidden.reshape(1, -1, hidden.shape[-1])[:, self._positions]
        return (selected, *args[1:])

    @override
    def prepare_inputs(self, batch: Batch, device: torch.device | str) -> Inputs:
        """Return the arguments of `forward` for `batch`, tensors on `device`."""
        labels = batch.target_ids
        num_rows, width = batch.input_ids.shape
        lengths = batch.segment_lengths if len(batch.segments) else np.full(num_rows, width)
        mask = np.arange(width) < lengths[:, None]  # (B, T)
        ids = np.where(mask, batch.input_ids, self._special.pad)

        if self._task.keeps_texts_apart:
            arrays = self._split_texts(ids, mask, labels)
        else:
            arrays = {"ids": ids, "mask": mask.astype(np.int64), "labels": labels}

        if self._task.masks_tokens:
            # Computed on the host, so that the device need not synchronize. Without masked tokens,
            # one position that is ignored.
            has_labels = (labels != IGNORE_INDEX).any()
            positions = np.flatnonzero(labels != IGNORE_INDEX) if has_labels else np.zeros(1, int)
            arrays["positions"] = positions

        return {
            name: torch.from_numpy(array).to(device, non_blocking=True)
            for name, array in arrays.items()
        }

    def _split_texts(
        self, ids: np.ndarray, mask: np.ndarray, labels: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Return both texts of each row, (B, T1) and (B, T2); the second starts at a label."""
        is_labeled = labels != IGNORE_INDEX  # (B, T)
        has_labels = is_labeled.any(1)  # (B,)
        ends = mask.sum(1)
        middles = np.maximum(1, ends // 2)  # where an empty row is split
        starts = np.where(has_labels, is_labeled.argmax(1), middles)

        first_rows, second_rows = [], []
        for row, start, end in zip(ids, starts.tolist(), ends.tolist(), strict=True):
            first_rows.append(row[:start])
            second_rows.append(row[start:end])
        first = _pad_rows(first_rows, self._special.pad)
        second = _pad_rows(second_rows, self._special.pad)

        is_target = (second.mask > 0) & has_labels[:, None]
        return {
            "ids": first.ids,
            "mask": first.mask,
            "second_ids": second.ids,
            "second_mask": second.mask,
            "labels": np.where(is_target, second.ids, IGNORE_INDEX),
        }

    def forward(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor,
        labels: torch.Tensor,
        second_ids: torch.Tensor | None = None,
        second_mask: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        return_outputs: bool = False,
    ) -> Any:
        """Return the summed loss (); with `return_outputs` a `LossAndOutputs`.

        Args:
            ids, mask, labels, second_ids, second_mask: see `TaskInputs`.
            positions: masked_lm: (N,) indices into B*T of the masked tokens.
            return_outputs: also return the model's predictions.
        """
        self._positions = positions
        inputs = TaskInputs(ids, mask, labels, second_ids, second_mask, positions)
        loss, outputs = self.compute_loss(inputs)

        loss = self.add_penalty(loss, labels)
        self._row_lengths = self._positions = None
        return LossAndOutputs(loss, outputs.detach()) if return_outputs else loss

    @override
    def sample_length_at_positions(self, shape: torch.Size) -> torch.Tensor | None:
        return self._row_lengths

    def run_model(self, ids: torch.Tensor, mask: torch.Tensor) -> Any:
        """Return the model's output for `ids` (B, T), with the virtual tokens in front, if any."""
        if self.virtual is not None:
            ids, mask = self.virtual.prepend(ids, mask)
        # NEFTune scales noise by these lengths.
        self._row_lengths = mask.sum(1, keepdim=True)

        kwargs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        if self._takes_token_types:
            is_separator = (ids == self._special.separator) & (mask > 0)
            num_separators_before = is_separator.cumsum(1) - is_separator.long()  # (B, T)
            is_second_text = (num_separators_before > 0) & (mask > 0)
            kwargs["token_type_ids"] = is_second_text.long()
        if self._takes_use_cache:
            kwargs["use_cache"] = False
        return self.model(**kwargs)

    def drop_virtual_tokens(self, values: torch.Tensor) -> torch.Tensor:
        """Return `values` (B, T, ...) of each token, without the virtual tokens in front."""
        return values[:, len(self.virtual.ids) :] if self.virtual is not None else values

    def weighted_cross_entropy(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the cross-entropy of logits (N, K) to targets (N,), summed.

        With the class weights, the focal loss and the label smoothing of the config.
        """
        if self._class_weights is not None and self._class_weights.device != logits.device:
            self._class_weights = self._class_weights.to(logits.device)
        return loss_sums.cross_entropy(
            logits,
            targets,
            self._class_weights,
            self._task.section.focal_gamma,
            self.smoothing,
        )

    def run_encoder_decoder(self, inputs: TaskInputs) -> torch.Tensor:
        """Return the logits (B, T2, V) of the second texts."""
        # No noise: source and target share the embedding, and their lengths differ.
        self._row_lengths = None
        targets, target_mask = inputs.second_ids, inputs.second_mask

        # The decoder's inputs are the targets, shifted by one: (B, T2)
        start = self.model.config.decoder_start_token_id
        decoder_ids = torch.cat([torch.full_like(targets[:, :1], start), targets[:, :-1]], 1)
        decoder_mask = torch.cat([target_mask[:, :1], target_mask[:, :-1]], 1)

        ids, mask = inputs.ids, inputs.mask
        if self.virtual is not None:
            ids, mask = self.virtual.prepend(ids, mask)
        return self.model(
            input_ids=ids,
            attention_mask=mask,
            decoder_input_ids=decoder_ids,
            decoder_attention_mask=decoder_mask,
            use_cache=False,
        ).logits

    def embed_texts(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return the vectors (B, H) of texts (B, T)."""
        hidden = self.drop_virtual_tokens(self.run_model(ids, mask).last_hidden_state)
        return pool_hidden_states(hidden, mask, self._task.section.pooling)

    def compute_loss(self, inputs: TaskInputs) -> LossAndOutputs:
        """Return the loss of a batch and the outputs of its rows; see `ModelTask.compute_loss`."""
        return self._task.compute_loss(self, inputs)

    @property
    def smoothing(self) -> float:
        """Label smoothing of this forward: in training only."""
        return self._smoothing if self.training else 0.0


def pool_hidden_states(hidden: torch.Tensor, mask: torch.Tensor, pooling: str) -> torch.Tensor:
    """Return the vectors (B, H) of texts from hidden states (B, T, H), padded on the right.

    `pooling`: see task.pooling.
    """
    if pooling == "first":
        return hidden[:, 0]
    if pooling == "last":
        return hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(1) - 1]
    return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


class PaddedRows(NamedTuple):
    """Token ids (B, T) int64, padded on the right, and their mask (B, T) int64."""

    ids: np.ndarray
    mask: np.ndarray


def _pad_rows(rows: list[np.ndarray], pad: int) -> PaddedRows:
    lengths = np.array([len(row) for row in rows])
    mask = np.arange(max(1, lengths.max())) < lengths[:, None]
    ids = np.full(mask.shape, pad, dtype=np.int64)
    ids[mask] = np.concatenate(rows)
    return PaddedRows(ids, mask.astype(np.int64))
