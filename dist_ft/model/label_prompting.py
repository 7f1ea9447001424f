"""Classification by a causal model: the probability of each label's words after a prompt.

In training the words of a row's own label are the only target tokens: the loss of a row is minus
the score of its label. Outside training all labels are scored. The prompt is computed once; only
labels of more than one token run again, from the prompt's cache. Guarantees: the calls of the model
follow from the labels alone, so every rank makes the same ones; scores do not depend on the other
rows of a batch.

Dimensions: B rows of a batch, T tokens of a prompt, K labels, W tokens of the longest label, L
labels of more than one token, C prompts without content, V vocabulary size, N positions with
logits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import nn
from typing_extensions import override

from dist_ft.config.sections.task import TaskSection
from dist_ft.core.errors import ModelError
from dist_ft.data.batch import IGNORE_INDEX
from dist_ft.data.encoding.prompt_templates import LabelWords
from dist_ft.model.heads import length_error
from dist_ft.model.model_task import LossAndOutputs
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
        """Wrap `model`.

        Args:
            model: a model with an output layer.
            task: sequence_classification.
            special: the tokenizer's special tokens.
            words: the words of the task's labels.
            sequence_length: most tokens of a prompt and the longest label together.
            label_smoothing, neftune_alpha: in training only.

        Raises:
            ModelError: the model has no output layer, or cannot take so long a sequence.
        """
        super().__init__(model, task, special, label_smoothing, neftune_alpha)
        head = model.get_output_embeddings()
        if head is None:
            raise ModelError(
                f"model of type {model.config.model_type}: it has no output embeddings to score "
                "words with. Only causal language models are allowed. Choose another model."
            )
        if message := length_error(model.config, sequence_length, str(model.name_or_path)):
            raise ModelError(message)

        self._use_mean = words.use_mean
        self._word_ids, self._word_counts = _word_table(words.ids)
        self._content_free_prompts = [list(ids) for ids in words.content_free_prompts]
        head.register_forward_pre_hook(self._select_positions)

    @override
    def forward(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor,
        labels: torch.Tensor,
        second_ids: Any = None,
        second_mask: Any = None,
        positions: Any = None,
        return_outputs: bool = False,
    ) -> Any:
        """Return the summed loss () of prompts (B, T).

        With `return_outputs` a `LossAndOutputs` with the scores of all labels, (B, K).
        """
        if self._word_ids.device != ids.device:
            self._word_ids = self._word_ids.to(ids.device)
            self._word_counts = self._word_counts.to(ids.device)

        # The row of an ignored label computes the score of label 0, which gets the weight 0.
        targets = labels[:, 0]  # (B,)
        label_numbers = targets.clamp(min=0)

        scores = None
        if return_outputs:
            all_scores = self._score_labels(ids, mask)
            scores = all_scores[: len(ids)]
            content_free_scores = all_scores[len(ids) :]

            # The loss is that of training, so it uses the scores without calibration.
            target_scores = scores.gather(1, label_numbers[:, None])[:, 0]
            if self._content_free_prompts:
                # Calibrate: subtract the log of each label's mean share after prompts without
                # content.
                shares = torch.log_softmax(content_free_scores, 1)
                scores = scores - shares.logsumexp(0)
        else:
            target_scores = self._score_targets(ids, mask, label_numbers)

        weights = (targets != IGNORE_INDEX).float()
        if self._class_weights is not None:
            weights = weights * self._class_weights.to(ids.device)[label_numbers]
        loss = -(target_scores * weights).sum()

        if scores is None:
            return loss
        return LossAndOutputs(loss, scores.detach())

    def _score_targets(
        self, ids: torch.Tensor, mask: torch.Tensor, label_numbers: torch.Tensor
    ) -> torch.Tensor:
        """Return the score (B,) of each prompt's label, `label_numbers` (B,), in one forward."""
        num_rows, device = len(ids), ids.device
        lengths = mask.sum(1)  # (B,)
        words = self._word_ids[label_numbers]  # (B, W)
        counts = self._word_counts[label_numbers]  # (B,)
        width = words.shape[1]

        # Write the words behind each prompt: (B, T + W)
        word_places = lengths[:, None] + torch.arange(width, device=device)  # (B, W)
        padding = ids.new_full((num_rows, width), self._special.pad)
        sequences = torch.cat([ids, padding], 1).scatter(1, word_places, words)

        # The last word is only a target. What follows is hidden, also the rest of the prompt's own
        # padding.
        total = sequences.shape[1]
        is_seen = torch.arange(total, device=device) < (lengths + counts - 1)[:, None]

        # The logits that predict a word are those one position before it.
        row_starts = torch.arange(num_rows, device=device)[:, None] * total
        positions = (row_starts + word_places - 1).flatten()
        logits = self._logits_at(sequences, is_seen.long(), positions)
        log_probabilities = self._log_probabilities(logits, words.flatten())
        return self._sum_over_words(log_probabilities.reshape(words.shape), counts)

    def _score_labels(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return the score of each label after prompts (B, T) and content-free ones, (B + C, K)."""
        lengths = mask.sum(1).tolist()
        prompts = [row[:length] for row, length in zip(ids.tolist(), lengths, strict=True)]
        prompts += self._content_free_prompts

        # Pad on the left, as words follow: (B + C, T)
        width = max(map(len, prompts))
        padded_ids, padded_mask = [], []
        for row in prompts:
            num_padding = width - len(row)
            padded_ids.append([self._special.pad] * num_padding + row)
            padded_mask.append([0] * num_padding + [1] * len(row))
        ids = ids.new_tensor(padded_ids)
        mask = ids.new_tensor(padded_mask)
        num_prompts = len(ids)

        # The logits of a prompt's last token score the first word of every label at once.
        long_labels = torch.nonzero(self._word_counts > 1).flatten()  # (L,)
        use_cache = self._takes_use_cache and len(long_labels) > 0
        last_positions = torch.arange(1, num_prompts + 1, device=ids.device) * width - 1
        output = self._run_at(ids, mask, last_positions, use_cache=use_cache)
        logits = output.logits.reshape(num_prompts, -1).float()  # (B + C, V)
        first_words = torch.log_softmax(logits, -1)[:, self._word_ids[:, 0]]  # (B + C, K)

        log_probabilities = torch.zeros(num_prompts, *self._word_ids.shape, device=ids.device)
        log_probabilities[:, :, 0] = first_words
        if len(long_labels):
            further = self._score_further_words(output, ids, mask, long_labels)
            log_probabilities[:, long_labels, 1:] = further
        return self._sum_over_words(log_probabilities, self._word_counts.expand(num_prompts, -1))

    def _score_further_words(
        self, output: Any, ids: torch.Tensor, mask: torch.Tensor, long_labels: torch.Tensor
    ) -> torch.Tensor:
        """Return the log-probabilities (B, L, W - 1) of the words after the first.

        Args:
            output: the model's output for the prompts, with its cache if it has one.
            ids, mask: (B, T) the prompts, padded on the left.
            long_labels: (L,) numbers of labels.
        """
        num_prompts, num_labels = len(ids), len(long_labels)
        words = self._word_ids[long_labels]  # (L, W)
        inputs = words[:, :-1].repeat(num_prompts, 1)  # (B * L, W - 1)
        targets = words[:, 1:].repeat(num_prompts, 1).flatten()
        prompt_mask = mask.repeat_interleave(num_labels, 0)
        whole_mask = torch.cat([prompt_mask, torch.ones_like(inputs)], 1)  # (B * L, T + W - 1)

        # Each prompt's cache serves all its long labels.
        cache = getattr(output, "past_key_values", None)
        if cache is not None and hasattr(cache, "batch_repeat_interleave"):
            cache.batch_repeat_interleave(num_labels)
            output = self._run_at(inputs, whole_mask, None, past_key_values=cache, use_cache=True)
        else:
            # Without such a cache, run prompts and words from the start.
            sequences = torch.cat([ids.repeat_interleave(num_labels, 0), inputs], 1)
            total = whole_mask.shape[1]
            row_starts = torch.arange(len(inputs), device=ids.device)[:, None] * total
            word_places = torch.arange(prompt_mask.shape[1], total, device=ids.device)
            positions = (row_starts + word_places).flatten()
            output = self._run_at(sequences, whole_mask, positions)

        log_probabilities = self._log_probabilities(output.logits, targets)
        return log_probabilities.reshape(num_prompts, num_labels, inputs.shape[1])

    def _run_at(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor,
        positions: torch.Tensor | None,
        **kwargs: Any,
    ) -> Any:
        """Return the model's output for ids (B, T), logits at `positions` (N,); None: at all.

        `mask` (B, P + T) covers the P cached tokens and then `ids`.
        """
        # Positions count real tokens only, so left padding does not shift them.
        position_ids = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        if self._takes_use_cache:
            kwargs = {"use_cache": False, **kwargs}
        self._positions = positions
        try:
            return self.model(
                input_ids=ids, attention_mask=mask, position_ids=position_ids, **kwargs
            )
        finally:
            self._positions = None

    def _logits_at(
        self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """Return the logits (N, V) at `positions` (N,) of right-padded prompts, with NEFTune."""
        self._row_lengths = mask.sum(1, keepdim=True)
        try:
            output = self._run_at(ids, mask, positions)
        finally:
            self._row_lengths = None
        return output.logits.reshape(len(positions), -1)

    def _log_probabilities(self, logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Return the log-probability (N,) of tokens (N,) by logits (..., N, V)."""
        losses = nn.functional.cross_entropy(
            logits.reshape(len(tokens), -1).float(),
            tokens,
            reduction="none",
            label_smoothing=self._smoothing if self.training else 0.0,
        )
        return -losses

    def _sum_over_words(
        self, log_probabilities: torch.Tensor, counts: torch.Tensor
    ) -> torch.Tensor:
        """Return scores (...) from log-probabilities (..., W) of the first `counts` (...) words."""
        width = log_probabilities.shape[-1]
        is_word = torch.arange(width, device=log_probabilities.device) < counts[..., None]

        # Selected, not multiplied by 0, which gives NaN for a padding token of probability 0.
        sums = torch.where(is_word, log_probabilities, 0.0).sum(-1)
        return sums / counts if self._use_mean else sums


class _WordTable(NamedTuple):
    """Words of all labels: token ids (K, W), padded with 0, and their numbers of tokens (K,)."""

    ids: torch.Tensor
    counts: torch.Tensor


def _word_table(words: tuple[tuple[int, ...], ...]) -> _WordTable:
    counts = np.array([len(label_words) for label_words in words])
    ids = np.zeros((len(words), counts.max()), dtype=np.int64)
    for row, label_words in zip(ids, words, strict=True):
        row[: len(label_words)] = label_words
    return _WordTable(torch.from_numpy(ids), torch.from_numpy(counts))
