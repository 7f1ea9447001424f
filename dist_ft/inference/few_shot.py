"""Models asked for labels by prompts: their examples, and the model of a folder that was trained to be asked so.

Examples of few-shot prompts are drawn from the training data once and kept with the run: the same on every rank.
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


class Prompted:
    """A causal model that is asked for the label of texts, as it was in training."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        task: TaskSection,
        prompting: PromptingSection,
        length: int,
    ) -> None:
        """Wrap a loaded model; `prompting` has its examples in its templates, `length` is the longest prompt's."""
        from dist_ft.data.encoding.prompt_encoder import PromptEncoder
        from dist_ft.model.label_prompting import LabelPromptModel
        from dist_ft.model.task_models import SpecialTokens

        data = DataSection.model_validate({"train": "unused", "overlong": "truncate"})
        self._encoder = PromptEncoder(tokenizer, data, task, prompting, length)
        self._model = LabelPromptModel(
            model, task, SpecialTokens.from_tokenizer(tokenizer, model.config), self._encoder.words(), length
        )
        self._model.eval()

    def scores(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> np.ndarray:
        """Return the score of each label (B, K) of texts, and second ones if there are any."""
        import torch

        samples = [
            Sample(*both)
            for both in (zip(texts, pairs, strict=True) if pairs else zip(texts, strict=True))
        ]
        found = self._encoder.prompts(samples)
        if None in found:
            raise DataError(
                "prompting.templates: leave no room for a text in the model's sequence length; shorter "
                "ones are needed; show fewer examples"
            )
        rows = [torch.tensor(ids or []) for ids in found]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(self._model.model.device)
        sizes = torch.tensor([len(row) for row in rows], device=ids.device)
        mask = (torch.arange(ids.shape[1], device=ids.device) < sizes[:, None]).long()
        with torch.inference_mode():
            _, told = self._model(ids, mask, torch.full_like(ids, IGNORE_INDEX), return_outputs=True)
        return told.float().cpu().numpy()
