"""masked_lm: predict masked tokens.

Dimensions: B rows of a batch, T tokens of a row, V vocabulary size, N masked positions of a batch.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from typing_extensions import override

from dist_ft.core.errors import ModelError
from dist_ft.data.batch import IGNORE_INDEX
from dist_ft.data.encoding import task_rows
from dist_ft.data.encoding.data_task import LabeledTokens, RowEncoder
from dist_ft.data.encoding.task_rows import Sample
from dist_ft.data.sources.discovery import Row, RowLocation
from dist_ft.model.model_task import LossAndOutputs, TaskAbility, TaskInputs, TaskModule
from dist_ft.tasks.results import RowResult
from dist_ft.tasks.token_accuracy import TokenTask


class MaskedLM(TokenTask):
    """Predict masked tokens.

    Every token but special ones is labeled with itself; which of them are masked is drawn for each
    batch. Outputs are predicted token ids (B, T), `IGNORE_INDEX` where no token is masked.
    """

    fields = ("mask_probability",)
    has_head = True
    splits_rows = True
    auto_class = "AutoModelForMaskedLM"
    ability = TaskAbility("predict masked tokens", "encoders such as BERT")
    masks_tokens = True

    @override
    def read(self, row: Row, location: RowLocation) -> Sample:
        return Sample(task_rows.read_text(row, self.columns.text, "text", location))

    @override
    def set_truncation(self, backend: Any, encoder: RowEncoder) -> None:
        if encoder.tokenizer.mask_token_id is None:
            raise ModelError(
                "task.name=masked_lm: the tokenizer has no mask token. Encoders such as BERT "
                "have one. Choose such a model, or task.name=causal_lm."
            )

        if encoder.data.overlong == "split":
            backend.enable_truncation(encoder.sequence_length)
        else:
            super().set_truncation(backend, encoder)

    @override
    def label_tokens(self, encoding: Any, sample: Sample, encoder: RowEncoder) -> LabeledTokens:
        ids: list[int] = []
        labels = []
        for window in (encoding, *encoding.overflowing):
            is_special = np.array(window.special_tokens_mask, bool)
            tokens = np.array(window.ids, np.int32)
            labels.append(np.where(is_special, np.int32(IGNORE_INDEX), tokens))
            ids += window.ids

        return LabeledTokens(ids, np.concatenate(labels))

    @override
    def compute_loss(self, model: TaskModule, inputs: TaskInputs) -> LossAndOutputs:
        import torch

        from dist_ft.model.losses import loss_sums

        logits = model.run_model(inputs.ids, inputs.mask).logits[0]  # (N, V)
        targets = inputs.labels.flatten()[inputs.positions]
        loss = loss_sums.cross_entropy(logits, targets, smoothing=model.smoothing)

        # Put the predictions of masked tokens back into rows.
        predicted = torch.full_like(inputs.ids.flatten(), IGNORE_INDEX)
        predicted = predicted.index_put((inputs.positions,), logits.argmax(-1))
        return LossAndOutputs(loss, predicted.view(inputs.ids.shape))

    @override
    def read_output(self, labels: np.ndarray, output: np.ndarray) -> RowResult:
        """Count correct tokens; `output`: (T,) a token for each position."""
        is_target = labels != IGNORE_INDEX
        is_correct = (output[: len(labels)] == labels)[is_target]
        return RowResult((int(is_correct.sum()), int(is_target.sum())), 0)
