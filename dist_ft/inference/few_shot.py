"""An exported model that is prompted for labels, as it was in training, with its examples.

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
    """A causal model that is prompted for the label of texts."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        task: TaskSection,
        prompting: PromptingSection,
        max_prompt_tokens: int,
    ) -> None:
        """Wrap a loaded model; `prompting` has its examples in its templates."""
        from dist_ft.data.encoding.prompt_encoder import PromptEncoder
        from dist_ft.model.label_prompting import LabelPromptModel
        from dist_ft.model.task_models import SpecialTokens

        # The encoder takes the section of a run. Its `train` is required, but not read here; a text
        # that is too long is truncated, as a prediction has no row to drop.
        data = DataSection.model_validate({"train": "unused", "overlong": "truncate"})
        self._encoder = PromptEncoder(tokenizer, data, task, prompting, max_prompt_tokens)
        special = SpecialTokens.from_tokenizer(tokenizer, model.config)
        self._model = LabelPromptModel(
            model, task, special, self._encoder.label_words(), max_prompt_tokens
        )
        self._model.eval()

    def scores(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> np.ndarray:
        """Return the score of each label (B, K) for texts.

        `pairs`: second texts, if rows have them.
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

        # Padded on the right: the model scores labels from the length of each prompt.
        rows = [torch.tensor(ids or []) for ids in prompts]
        device = self._model.model.device
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)  # (B, T)
        lengths = torch.tensor([len(row) for row in rows], device=device)
        mask = (torch.arange(ids.shape[1], device=device) < lengths[:, None]).long()  # (B, T)

        # The forward also returns a loss, which needs targets; here it is 0.
        no_targets = torch.full_like(ids, IGNORE_INDEX)
        with torch.inference_mode():
            _, scores = self._model(ids, mask, no_targets, return_outputs=True)  # (B, K)

        return scores.float().cpu().numpy()
