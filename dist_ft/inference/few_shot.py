"""Classification by an exported model that is prompted, with the same prompts as in its run.

Dimensions: B texts, T tokens of the longest prompt, K labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dist_ft.config.schema import DataSection, PromptingSection, TaskSection
from dist_ft.core.errors import DataError
from dist_ft.data.batch import IGNORE_INDEX
from dist_ft.data.encoding.task_rows import Sample

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class PromptedClassifier:
    """A causal model that scores the labels of a text by the words of each label after a prompt."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        task: TaskSection,
        prompting: PromptingSection,
        sequence_length: int,
    ) -> None:
        """Wrap a loaded model.

        Args:
            model: the model; it stays on its device.
            tokenizer: its tokenizer.
            task: the task, with labels.
            prompting: how the model is prompted. The template already holds the examples.
            sequence_length: most tokens of a prompt and the longest label together.

        Raises:
            ConfigError: two labels have the same tokens.
            ModelError: the model cannot be prompted, or not with sequences of this length.
        """
        from dist_ft.data.encoding.prompt_encoder import PromptEncoder
        from dist_ft.model.label_prompting import LabelPromptModel
        from dist_ft.model.task_models import SpecialTokens

        # The encoder takes a run's data section, which requires `train`; nothing reads it here.
        # A text that is too long is truncated, because each row needs a prediction.
        data = DataSection.model_validate({"train": "unused", "overlong": "truncate"})
        self._encoder = PromptEncoder(tokenizer, data, task, prompting, sequence_length)
        special = SpecialTokens.from_tokenizer(tokenizer, model.config)
        self._model = LabelPromptModel(
            model, task, special, self._encoder.label_words(), sequence_length
        )
        self._model.eval()

    def scores(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> np.ndarray:
        """Return the scores (B, K) of the labels: the log-probabilities of their words.

        These are summed or averaged, and calibrated, as `prompting` says.

        Args:
            texts: the texts.
            pairs: the second text of each row, if rows have two.

        Raises:
            DataError: the template alone does not fit into the sequence length.
        """
        import torch

        if pairs is None:
            samples = [Sample(text) for text in texts]
        else:
            samples = [Sample(text, pair) for text, pair in zip(texts, pairs, strict=True)]

        prompts = self._encoder.encode_prompts(samples)
        if None in prompts:
            raise DataError(
                "prompting.templates: leave no tokens for a text in the model's sequence length. "
                "Shorter templates are needed. Show fewer examples."
            )

        # Padding may be on the right: the model takes the length of each prompt from the mask. No
        # prompt is None here, `or []` is for the type checker only.
        rows = [torch.tensor(ids or []) for ids in prompts]
        device = self._model.model.device
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)  # (B, T)
        lengths = torch.tensor([len(row) for row in rows], device=device)
        mask = (torch.arange(ids.shape[1], device=device) < lengths[:, None]).long()  # (B, T)

        # The model also returns a loss, which is 0 without targets and not used.
        no_targets = torch.full_like(ids, IGNORE_INDEX)
        with torch.inference_mode():
            _, scores = self._model(ids, mask, no_targets, return_outputs=True)  # (B, K)

        return scores.float().cpu().numpy()
