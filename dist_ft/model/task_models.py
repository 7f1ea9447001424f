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
from dist_ft.core.errors import ModelError
from dist_ft.data.batch import IGNORE_INDEX, Batch
from dist_ft.data.encoding.answer_spans import last_tokens
from dist_ft.data.encoding.task_encoder import LABELS_PER_POSITION
from dist_ft.model.losses import loss_sums
from dist_ft.model.trainable_model import Inputs, TrainableModel

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

MASKED_LOGIT = -1e9
"""Logit of positions that cannot hold an answer."""


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


class TaskInputs(NamedTuple):
    """Tensors of one batch of a task.

    Attributes:
        ids: (B, T) token ids, padded on the right; of two texts a row the first, (B, T1).
        mask: int64, shape of `ids`: 1 where a token is, 0 in the padding.
        labels: (B, T) labels as the task encodes them, or `IGNORE_INDEX`; of two texts a row (B,
            T2).
        second_ids: (B, T2) the second text of each row (seq2seq: the target; embedding: the other
            text).
        second_mask: (B, T2) int64, as `mask`.
    """

    ids: Any
    mask: Any
    labels: Any
    second_ids: Any = None
    second_mask: Any = None


class LossAndOutputs(NamedTuple):
    """Result of a forward.

    Attributes:
        loss: summed over the samples or tokens of the batch, float32 ().
        outputs: predictions of the model (logits, scores, token ids or vectors), rows first.
    """

    loss: torch.Tensor
    outputs: torch.Tensor


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
            ModelError: seq2seq, and the model's config has no decoder_start_token_id.
        """
        super().__init__(model, neftune_alpha)
        self._task = task
        self._special = special
        self._smoothing = label_smoothing
        self._class_weights: torch.Tensor | None = None
        if task.class_weights:
            self._class_weights = torch.tensor(task.class_weights)
        self._row_lengths: torch.Tensor | None = None  # (B, 1), of the current forward
        self._positions: torch.Tensor | None = None  # (N,), of the current forward
        self._takes_use_cache = "use_cache" in inspect.signature(model.forward).parameters
        if task.name == "seq2seq" and model.config.decoder_start_token_id is None:
            raise ModelError(
                f"model of type {model.config.model_type}: its config has no "
                "decoder_start_token_id, the first token of every generated text. Set it in "
                "config.json."
            )

        if task.name == "masked_lm":
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

        if self._task.name in ("seq2seq", "embedding"):
            arrays = self._split_texts(ids, mask, labels)
        else:
            arrays = {"ids": ids, "mask": mask.astype(np.int64), "labels": labels}

        if self._task.name == "masked_lm":
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
        compute_loss = getattr(self, f"_{self._task.name}_loss")
        inputs = TaskInputs(ids, mask, labels, second_ids, second_mask)
        loss, outputs = compute_loss(inputs)

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

    def _weighted_cross_entropy(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the cross-entropy of logits (N, K) to targets (N,), with the task's options."""
        if self._class_weights is not None and self._class_weights.device != logits.device:
            self._class_weights = self._class_weights.to(logits.device)
        return loss_sums.cross_entropy(
            logits,
            targets,
            self._class_weights,
            self._task.focal_gamma,
            self._smoothing if self.training else 0.0,
        )

    def _sequence_classification_loss(self, inputs: TaskInputs) -> LossAndOutputs:
        """Outputs: logits (B, K)."""
        logits = self.run_model(inputs.ids, inputs.mask).logits
        loss = self._weighted_cross_entropy(logits, inputs.labels[:, 0])
        return LossAndOutputs(loss, logits)

    def _token_classification_loss(self, inputs: TaskInputs) -> LossAndOutputs:
        """Outputs: logits (B, T, K)."""
        logits = self.drop_virtual_tokens(self.run_model(inputs.ids, inputs.mask).logits)
        loss = self._weighted_cross_entropy(logits.flatten(0, 1), inputs.labels.flatten())
        return LossAndOutputs(loss, logits)

    def _multi_label_loss(self, inputs: TaskInputs) -> LossAndOutputs:
        """Outputs: logits (B, K). Labels are bits, `LABELS_PER_POSITION` in a position."""
        logits = self.run_model(inputs.ids, inputs.mask).logits
        num_labels = logits.shape[1]
        label_numbers = torch.arange(num_labels, device=logits.device)
        num_words = -(-num_labels // LABELS_PER_POSITION)

        words = inputs.labels[:, :num_words].clamp(min=0)  # (B, num_words)
        words_of_labels = words[:, label_numbers // LABELS_PER_POSITION]  # (B, K)
        bits = words_of_labels >> (label_numbers % LABELS_PER_POSITION) & 1

        # A row counts once for each position that is labeled: the trainer divides by positions.
        row_weights = (inputs.labels[:, 0] != IGNORE_INDEX) * num_words
        loss = loss_sums.binary_cross_entropy(logits, bits, row_weights, self._task.focal_gamma)
        return LossAndOutputs(loss, logits)

    def _regression_loss(self, inputs: TaskInputs) -> LossAndOutputs:
        """Outputs: values (B,). Labels are float32 values, stored by their bits."""
        values = self.run_model(inputs.ids, inputs.mask).logits[:, 0]
        labels = inputs.labels[:, 0]
        is_labeled = labels != IGNORE_INDEX
        targets = labels.to(torch.int32).view(torch.float32)
        targets = torch.where(is_labeled, targets, 0.0)
        return LossAndOutputs(loss_sums.squared_error(values, targets, is_labeled), values)

    def _question_answering_loss(self, inputs: TaskInputs) -> LossAndOutputs:
        """Outputs: logits of an answer's start and end, (B, T, 2)."""
        output = self.run_model(inputs.ids, inputs.mask)
        is_labeled = inputs.labels != IGNORE_INDEX
        has_answer = is_labeled.any(1)
        # The label stands at the first token of the answer, and holds its last token.
        first_labeled = is_labeled.long().argmax(1)  # (B,)
        start = torch.where(has_answer, first_labeled, IGNORE_INDEX)
        last = last_tokens(inputs.labels.gather(1, first_labeled[:, None])[:, 0])
        end = torch.where(has_answer, last, IGNORE_INDEX)

        start_logits, end_logits = (
            self.drop_virtual_tokens(logits).masked_fill(inputs.mask == 0, MASKED_LOGIT)
            for logits in (output.start_logits, output.end_logits)
        )
        start_loss = loss_sums.cross_entropy(start_logits, start)
        end_loss = loss_sums.cross_entropy(end_logits, end)
        loss = (start_loss + end_loss) / 2
        return LossAndOutputs(loss, torch.stack([start_logits, end_logits], -1))

    def _masked_lm_loss(self, inputs: TaskInputs) -> LossAndOutputs:
        """Outputs: predicted token ids (B, T), `IGNORE_INDEX` where no token is masked."""
        logits = self.run_model(inputs.ids, inputs.mask).logits[0]  # (N, V)
        loss = loss_sums.cross_entropy(
            logits,
            inputs.labels.flatten()[self._positions],
            smoothing=self._smoothing if self.training else 0.0,
        )

        # Put the predictions of masked tokens back into rows.
        predicted = torch.full_like(inputs.ids.flatten(), IGNORE_INDEX)
        predicted = predicted.index_put((self._positions,), logits.argmax(-1))
        return LossAndOutputs(loss, predicted.view(inputs.ids.shape))

    def _seq2seq_loss(self, inputs: TaskInputs) -> LossAndOutputs:
        """Outputs: predicted token ids (B, T2)."""
        logits = self._seq2seq_logits(inputs)
        loss = loss_sums.cross_entropy(
            logits.flatten(0, 1),
            inputs.labels.flatten(),
            smoothing=self._smoothing if self.training else 0.0,
        )
        return LossAndOutputs(loss, logits.argmax(-1))

    def _seq2seq_logits(self, inputs: TaskInputs) -> torch.Tensor:
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

    def _embedding_loss(self, inputs: TaskInputs) -> LossAndOutputs:
        """Outputs: vectors of both texts, (B, 2, H)."""
        first = self._embed(inputs.ids, inputs.mask)
        second = self._embed(inputs.second_ids, inputs.second_mask)
        has_labels = (inputs.labels != IGNORE_INDEX).any(1)
        loss = loss_sums.contrastive(first, second, has_labels, self._task.temperature)
        return LossAndOutputs(loss, torch.stack([first, second], 1))

    def _embed(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return the vectors (B, H) of texts (B, T)."""
        hidden = self.drop_virtual_tokens(self.run_model(ids, mask).last_hidden_state)
        return pool_hidden_states(hidden, mask, self._task.pooling)


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
