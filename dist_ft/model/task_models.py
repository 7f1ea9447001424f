"""Models with a head: a padded batch in, the summed loss of its task out, and what the model tells of each row.

Guarantees: padding is seen by nothing; a batch without labels gives loss zero and a gradient of zero everywhere, so
that every rank can make the same number of calls; the sum (not the mean) leaves the module, as in `causal_lm`.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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


@dataclass(frozen=True)
class SpecialTokens:
    """What a model must know of its tokenizer.

    Attributes:
        pad: id that padding has.
        separator: id between the texts of a pair, after which token types are 1; None: the model knows no types.
    """

    pad: int
    separator: int | None = None

    @classmethod
    def of(cls, tokenizer: Any, config: PretrainedConfig) -> SpecialTokens:
        """Return those of a model and its tokenizer; a model that names no pad token is told one."""
        inner = config.get_text_config()
        if inner.pad_token_id is None:
            known = (tokenizer.pad_token_id, tokenizer.eos_token_id)
            inner.pad_token_id = next((found for found in known if found is not None), 0)
            config.pad_token_id = inner.pad_token_id
        return cls(
            inner.pad_token_id,
            tokenizer.sep_token_id if "token_type_ids" in tokenizer.model_input_names else None,
        )


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
        """Wrap `model`; smoothing and noise are for training, `eval` leaves them out."""
        super().__init__(model, neftune_alpha)
        self._task = task
        self._special = special
        self._smoothing = label_smoothing
        self._weights = torch.tensor(task.class_weights) if task.class_weights else None
        self._sizes: torch.Tensor | None = None
        self._caches = "use_cache" in inspect.signature(model.forward).parameters
        if task.name == "seq2seq" and model.config.decoder_start_token_id is None:
            raise ModelError(
                f"model of type {model.config.model_type}: its config names no decoder_start_token_id, "
                "which begins every text it makes; one is needed; set it in config.json"
            )
        self._positions: torch.Tensor | None = None
        if task.name == "masked_lm":
            model.get_output_embeddings().register_forward_pre_hook(self._select)
        self._types = (
            special.separator is not None and getattr(model.config, "type_vocab_size", 0) > 1
        )

    def _select(self, _head: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> Any:
        """Hand the output layer only the hidden states (1, N, H) at masked positions of (B, T, H)."""
        if self._positions is None:
            return None
        return (args[0].reshape(1, -1, args[0].shape[-1])[:, self._positions], *args[1:])

    @override
    def inputs(self, batch: Batch, device: torch.device | str) -> Inputs:
        """Return `ids` (B, T), `mask` (B, T) and `labels` (B, T), or what they become for two texts a row."""
        ids, labels = batch.input_ids, batch.target_ids
        sizes = batch.segment_lengths if len(batch.segments) else np.full(len(ids), ids.shape[1])
        mask = np.arange(ids.shape[1]) < sizes[:, None]
        arrays = {
            "ids": np.where(mask, ids, self._special.pad),
            "mask": mask.astype(np.int64),
            "labels": labels,
        }
        if self._task.name in ("seq2seq", "embedding"):
            arrays = self._apart(arrays["ids"], mask, labels)
        if (
            self._task.name == "masked_lm"
        ):  # found on the host; one that counts nothing where none is masked
            arrays["positions"] = (
                np.flatnonzero(labels != IGNORE_INDEX) if (labels != IGNORE_INDEX).any() else np.zeros(1, int)
            )
        return {
            name: torch.from_numpy(array).to(device, non_blocking=True)
            for name, array in arrays.items()
        }

    def _apart(
        self, ids: np.ndarray, mask: np.ndarray, labels: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Return both texts of each row as (B, T1) and (B, T2); the second begins with the first label."""
        marked = labels != IGNORE_INDEX
        begins = np.where(marked.any(1), marked.argmax(1), np.maximum(1, mask.sum(1) // 2))
        ends = mask.sum(1)
        rows = [
            (row[:cut], row[cut:end], bool(own.any()))
            for row, cut, end, own in zip(ids, begins.tolist(), ends.tolist(), marked, strict=True)
        ]
        first, first_mask = _padded([row[0] for row in rows], self._special.pad)
        second, second_mask = _padded([row[1] for row in rows], self._special.pad)
        counted = np.array([row[2] for row in rows])[:, None]
        return {
            "ids": first,
            "mask": first_mask,
            "second": second,
            "second_mask": second_mask,
            "labels": np.where((second_mask > 0) & counted, second, IGNORE_INDEX),
        }

    def forward(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor,
        labels: torch.Tensor,
        second: torch.Tensor | None = None,
        second_mask: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        return_outputs: bool = False,
    ) -> Any:
        """Return the summed loss (); with `told` also what the model tells: a tensor whose first axis is the rows."""
        self._positions = positions
        loss, outputs = getattr(self, f"_{self._task.name}")(ids, mask, labels, second, second_mask)
        loss = self.add_penalty(loss, labels)
        self._sizes = self._positions = None
        return (loss, outputs.detach()) if return_outputs else loss

    @override
    def sample_length_at_positions(self, shape: torch.Size) -> torch.Tensor | None:
        return self._sizes

    def _run(self, ids: torch.Tensor, mask: torch.Tensor) -> Any:
        """Return what the model puts out for its virtual tokens, if it has any, and those of `ids` (B, T) behind."""
        if self.virtual is not None:
            ids, mask = self.virtual.before(ids, mask)
        self._sizes = mask.sum(1, keepdim=True)
        given = {"input_ids": ids, "attention_mask": mask}
        if self._types:
            ends = (ids == self._special.separator) & (mask > 0)
            given["token_type_ids"] = ((ends.cumsum(1) - ends.long() > 0) & (mask > 0)).long()
        return self.model(**given, **({"use_cache": False} if self._caches else {}))

    def _own(self, values: torch.Tensor) -> torch.Tensor:
        """Return what is said of each token, (B, T, ...), without the virtual ones in front."""
        return values[:, len(self.virtual.ids) :] if self.virtual is not None else values

    def _classify(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if self._weights is not None and self._weights.device != logits.device:
            self._weights = self._weights.to(logits.device)
        return loss_sums.cross_entropy(
            logits,
            targets,
            self._weights,
            self._task.focal_gamma,
            self._smoothing if self.training else 0.0,
        )

    def _sequence_classification(
        self, ids: Any, mask: Any, labels: Any, *_: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self._run(ids, mask).logits
        return self._classify(logits, labels[:, 0]), logits

    def _token_classification(
        self, ids: Any, mask: Any, labels: Any, *_: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self._own(self._run(ids, mask).logits)
        return self._classify(logits.flatten(0, 1), labels.flatten()), logits

    def _multi_label(
        self, ids: Any, mask: Any, labels: Any, *_: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self._run(ids, mask).logits
        numbers = torch.arange(logits.shape[1], device=logits.device)
        words = -(-logits.shape[1] // LABELS_PER_POSITION)
        bits = labels[:, :words].clamp(min=0)[:, numbers // LABELS_PER_POSITION] >> (numbers % LABELS_PER_POSITION) & 1
        counted = (labels[:, 0] != IGNORE_INDEX) * words  # as often as the row has labelled positions
        return loss_sums.binary_cross_entropy(logits, bits, counted, self._task.focal_gamma), logits

    def _regression(
        self, ids: Any, mask: Any, labels: Any, *_: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        values = self._run(ids, mask).logits[:, 0]
        counted = labels[:, 0] != IGNORE_INDEX
        wanted = labels[:, 0].to(torch.int32).view(torch.float32)
        return loss_sums.squared_error(values, torch.where(counted, wanted, 0.0), counted), values

    def _question_answering(
        self, ids: Any, mask: Any, labels: Any, *_: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        told = self._run(ids, mask)
        marked = labels != IGNORE_INDEX
        start = torch.where(marked.any(1), marked.long().argmax(1), IGNORE_INDEX)
        last = last_tokens(labels.gather(1, marked.long().argmax(1, keepdim=True))[:, 0])
        end = torch.where(marked.any(1), last, IGNORE_INDEX)
        both = [
            self._own(found).masked_fill(mask == 0, -1e9)
            for found in (told.start_logits, told.end_logits)
        ]
        loss = (loss_sums.cross_entropy(both[0], start) + loss_sums.cross_entropy(both[1], end)) / 2
        return loss, torch.stack(both, -1)

    def _masked_lm(
        self, ids: Any, mask: Any, labels: Any, *_: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self._run(ids, mask).logits[0]
        loss = loss_sums.cross_entropy(
            logits,
            labels.flatten()[self._positions],
            smoothing=self._smoothing if self.training else 0.0,
        )
        found = torch.full_like(ids.flatten(), IGNORE_INDEX).index_put(
            (self._positions,), logits.argmax(-1)
        )
        return loss, found.view(ids.shape)

    def _seq2seq(
        self, ids: Any, mask: Any, labels: Any, second: Any, second_mask: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self._seq2seq_logits(ids, mask, second, second_mask)
        loss = loss_sums.cross_entropy(
            logits.flatten(0, 1),
            labels.flatten(),
            smoothing=self._smoothing if self.training else 0.0,
        )
        return loss, logits.argmax(-1)

    def _seq2seq_logits(self, ids: Any, mask: Any, second: Any, second_mask: Any) -> torch.Tensor:
        self._sizes = None  # noise is the source's and the target's, whose lengths differ: none
        start = self.model.config.decoder_start_token_id
        before = torch.cat([torch.full_like(second[:, :1], start), second[:, :-1]], 1)
        if self.virtual is not None:
            ids, mask = self.virtual.before(ids, mask)
        return self.model(
            input_ids=ids,
            attention_mask=mask,
            decoder_input_ids=before,
            decoder_attention_mask=torch.cat([second_mask[:, :1], second_mask[:, :-1]], 1),
            use_cache=False,
        ).logits

    def _embedding(
        self, ids: Any, mask: Any, labels: Any, second: Any, second_mask: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        first, other = (
            pool_hidden_states(self._own(self._run(*text).last_hidden_state), text[1], self._task.pooling)
            for text in ((ids, mask), (second, second_mask))
        )
        counted = (labels != IGNORE_INDEX).any(1)
        return loss_sums.contrastive(first, other, counted, self._task.temperature), torch.stack(
            [first, other], 1
        )


def pool_hidden_states(hidden: torch.Tensor, mask: torch.Tensor, how: str) -> torch.Tensor:
    """Return the vectors (B, H) of texts from hidden states (B, T, H), padded on the right; `how`: see task.pooling."""
    if how == "first":
        return hidden[:, 0]
    if how == "last":
        return hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(1) - 1]
    return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def _padded(rows: list[np.ndarray], pad: int) -> tuple[np.ndarray, np.ndarray]:
    """Return rows of ids as one array (B, T), padded, and its mask."""
    sizes = np.array([len(row) for row in rows])
    mask = np.arange(max(1, sizes.max())) < sizes[:, None]
    ids = np.full(mask.shape, pad, dtype=np.int64)
    ids[mask] = np.concatenate(rows)
    return ids, mask.astype(np.int64)
