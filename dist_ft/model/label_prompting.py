"""A causal model asked for labels: how probable it finds each label's words after a prompt.

In training those words are learned, and nothing else: the loss of a row is minus the score of its own label. Without
training all labels are scored; the prompt is computed once, and only words of more than one token are run after it,
from its cache. Guarantees: which calls are made follows from the labels alone, so every rank makes the same; scores do
not depend on which rows share a batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from typing_extensions import override

from dist_ft.config.sections.task import TaskSection
from dist_ft.core.errors import ModelError
from dist_ft.data.batch import IGNORE_INDEX
from dist_ft.data.encoding.prompt_templates import LabelWords
from dist_ft.model.heads import length_error
from dist_ft.model.task_models import SpecialTokens, TaskModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class LabelPromptModel(TaskModel):
    """A transformers causal model that chooses among labels."""

    def __init__(
        self,
        model: PreTrainedModel,
        task: TaskSection,
        special: SpecialTokens,
        words: LabelWords,
        sequence_length: int,
        label_smoothing: float = 0.0,
        neftune_alpha: float = 0.0,
    ) -> None:
        """Wrap `model`; `words` are those of the task's labels, prompts have at most `sequence_length` less their own.

        Raises:
            ModelError: a model without an output layer, or one that can not take so long a sequence.
        """
        super().__init__(model, task, special, label_smoothing, neftune_alpha)
        head = model.get_output_embeddings()
        if head is None:
            raise ModelError(
                f"model of type {model.config.model_type}: it has no output embeddings to score words "
                "with; causal language models are allowed; choose another model"
            )
        if line := length_error(model.config, sequence_length, str(model.name_or_path)):
            raise ModelError(line)
        self._mean = words.mean
        self._ids, self._counts = _table(words.ids)
        self._empty = [list(ids) for ids in words.no_content]
        head.register_forward_pre_hook(self._select)

    @override
    def forward(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor,
        labels: torch.Tensor,
        second: Any = None,
        second_mask: Any = None,
        positions: Any = None,
        return_outputs: bool = False,
    ) -> Any:
        """Return the summed loss (), of prompts (B, T); with `told` also the scores of all labels (B, K)."""
        if self._ids.device != ids.device:
            self._ids, self._counts = self._ids.to(ids.device), self._counts.to(ids.device)
        wanted = labels[:, 0]
        rows = wanted.clamp(min=0)
        scores = self._scores(ids, mask) if return_outputs else None
        if scores is None:
            own = self._learned(ids, mask, rows)
        else:
            scores, no_content = scores[: len(ids)], scores[len(ids) :]
            own = scores.gather(1, rows[:, None])[:, 0]
            if self._empty:  # log of the mean share of each label after prompts without content
                scores = scores - torch.log_softmax(no_content, 1).logsumexp(0)
        weights = (wanted != IGNORE_INDEX).float()
        if self._weights is not None:
            weights = weights * self._weights.to(ids.device)[rows]
        loss = -(own * weights).sum()
        return (loss, scores.detach()) if scores is not None else loss

    def _learned(self, ids: torch.Tensor, mask: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Return (B,) the score of the label `rows` (B,) of each prompt, in one forward."""
        sizes, words, counts = mask.sum(1), self._ids[rows], self._counts[rows]
        width = words.shape[1]
        places = sizes[:, None] + torch.arange(width, device=ids.device)
        whole = torch.cat([ids, ids.new_full((len(ids), width), self._special.pad)], 1).scatter(
            1, places, words
        )
        seen = torch.arange(whole.shape[1], device=ids.device) < (sizes + counts - 1)[:, None]
        starts = torch.arange(len(ids), device=ids.device)[:, None] * whole.shape[1]
        logits = self._logits(whole, seen.long(), (starts + places - 1).flatten())
        return self._summed(self._told_of(logits, words.flatten()).reshape(words.shape), counts)

    def _scores(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return the score of each label (B + C, K) after prompts (B, T) and those without content, C of them."""
        rows = [
            row[:size] for row, size in zip(ids.tolist(), mask.sum(1).tolist(), strict=True)
        ] + self._empty
        width = max(map(len, rows))
        pad = self._special.pad
        ids = ids.new_tensor(
            [[pad] * (width - len(row)) + row for row in rows]
        )  # on the left: words come next
        mask = ids.new_tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        longer = torch.nonzero(self._counts > 1).flatten()
        cached = self._caches and len(longer) > 0
        last = torch.arange(1, len(ids) + 1, device=ids.device) * width - 1
        output = self._run_at(ids, mask, last, use_cache=cached)
        told = torch.log_softmax(output.logits.reshape(len(ids), -1).float(), -1)[
            :, self._ids[:, 0]
        ]  # (B, K)
        every = torch.zeros(len(ids), *self._ids.shape, device=ids.device)
        every[:, :, 0] = told
        if len(longer):
            every[:, longer, 1:] = self._rest(output, ids, mask, longer)
        return self._summed(every, self._counts.expand(len(ids), -1))

    def _rest(
        self, output: Any, ids: torch.Tensor, mask: torch.Tensor, longer: torch.Tensor
    ) -> torch.Tensor:
        """Return (B, L, V - 1) how probable the second and further tokens of the labels `longer` (L,) are."""
        words, num = self._ids[longer], len(longer)
        given = words[:, :-1].repeat(len(ids), 1)
        mask = mask.repeat_interleave(num, 0)
        seen = torch.cat([mask, torch.ones_like(given)], 1)
        shape = given.shape
        cache = getattr(output, "past_key_values", None)
        width = seen.shape[1]
        if cache is None or not hasattr(
            cache, "batch_repeat_interleave"
        ):  # a model without one: from the start
            whole = torch.cat([ids.repeat_interleave(num, 0), given], 1)
            places = torch.arange(len(given), device=ids.device)[:, None] * width + torch.arange(
                mask.shape[1], width, device=ids.device
            )
            logits = self._run_at(whole, seen, places.flatten()).logits
        else:
            cache.batch_repeat_interleave(num)
            logits = self._run_at(given, seen, None, past_key_values=cache, use_cache=True).logits
        return self._told_of(logits, words[:, 1:].repeat(len(ids), 1).flatten()).reshape(
            len(ids), num, shape[1]
        )

    def _run_at(
        self, ids: torch.Tensor, mask: torch.Tensor, places: torch.Tensor | None, **given: Any
    ) -> Any:
        """Return the model's output for ids (B, T), the last of what `mask` (B, P + T) covers, logits at `places`."""
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        self._positions = places
        try:
            return self.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                **({"use_cache": False, **given} if self._caches else given),
            )
        finally:
            self._positions = None

    def _logits(self, ids: torch.Tensor, mask: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """Return logits (N, vocabulary) at places of prompts padded on the right, learning."""
        self._sizes = mask.sum(1, keepdim=True)
        try:
            output = self._run_at(ids, mask, places)
        finally:
            self._sizes = None
        return output.logits.reshape(len(places), -1)

    def _told_of(self, logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Return (N,) the log-probability of tokens (N,) by logits (..., N, vocabulary)."""
        losses = nn.functional.cross_entropy(
            logits.reshape(len(tokens), -1).float(),
            tokens,
            reduction="none",
            label_smoothing=self._smoothing if self.training else 0.0,
        )
        return -losses

    def _summed(self, told: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """Return scores (...) from log-probabilities of words (..., V), of which the first `counts` (...) count."""
        own = torch.arange(told.shape[-1], device=told.device) < counts[..., None]
        sums = torch.where(own, told, 0.0).sum(-1)
        return sums / counts if self._mean else sums


def _table(words: tuple[tuple[int, ...], ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return words as one array (K, V), padded with 0, and how many tokens each has (K,)."""
    counts = np.array([len(own) for own in words])
    ids = np.zeros((len(words), counts.max()), dtype=np.int64)
    for row, own in zip(ids, words, strict=True):
        row[: len(own)] = own
    return torch.from_numpy(ids), torch.from_numpy(counts)
