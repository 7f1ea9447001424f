"""seq2seq: a text from a text, by an encoder-decoder.

Dimensions: B rows of a batch, T2 tokens of the target, V vocabulary size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class Seq2Seq(TokenTask):
    """Generate a text from a text.

    The source is before the target; the labels are the tokens of the target. Outputs are predicted
    token ids (B, T2).
    """

    generates_text = True
    allows_noise = False  # source and target share the embedding
    virtual_token_type = "SEQ_2_SEQ_LM"
    adapter_type = "SEQ_2_SEQ_LM"
    auto_class = "AutoModelForSeq2SeqLM"
    ability = TaskAbility("generate a text from a text", "encoder-decoders")
    weights_are_complete = True
    keeps_texts_apart = True

    @override
    @classmethod
    def accepts(cls, is_encoder_decoder: bool, is_encoder: bool) -> bool:
        return is_encoder_decoder

    @override
    def check_model_config(self, config: PretrainedConfig) -> None:
        if config.decoder_start_token_id is None:
            raise ModelError(
                f"model of type {config.model_type}: its config has no decoder_start_token_id, the "
                "first token of every generated text. Set it in config.json."
            )

    @override
    def read(self, row: Row, location: RowLocation) -> Sample:
        columns = self.columns
        source = task_rows.read_text(row, columns.source, "source", location)
        target = task_rows.read_text(row, columns.target, "target", location)
        return Sample(source, target)

    @override
    def text_columns(self) -> tuple[str, ...]:
        return (self.columns.source,)

    @override
    def set_truncation(self, backend: Any, encoder: RowEncoder) -> None:
        """Do not truncate here: how much depends on both texts."""

    @override
    def label_tokens(self, encoding: Any, sample: Sample, encoder: RowEncoder) -> LabeledTokens:
        source, target = encoding[0].ids, encoding[1].ids
        length = encoder.sequence_length
        is_too_long = len(source) + len(target) > length
        if is_too_long and encoder.data.overlong == "truncate":
            # The source loses its end first: the target keeps at least half of the sequence.
            target_room = max(length // 2, length - len(source))
            target = _truncate(target, target_room)
            source = _truncate(source, length - len(target))

        labels = np.array([IGNORE_INDEX] * len(source) + target, np.int32)
        return LabeledTokens([*source, *target], labels)

    @override
    def compute_loss(self, model: TaskModule, inputs: TaskInputs) -> LossAndOutputs:
        from dist_ft.model.losses import loss_sums

        logits = model.run_encoder_decoder(inputs)  # (B, T2, V)
        loss = loss_sums.cross_entropy(
            logits.flatten(0, 1), inputs.labels.flatten(), smoothing=model.smoothing
        )
        return LossAndOutputs(loss, logits.argmax(-1))

    @override
    def read_output(self, labels: np.ndarray, output: np.ndarray) -> RowResult:
        """Count correct tokens; `output`: a token for each target, without gaps."""
        targets = labels[labels != IGNORE_INDEX]
        num_correct = int((output[: len(targets)] == targets).sum())
        return RowResult((num_correct, len(targets)), 0)


def _truncate(ids: list[int], length: int) -> list[int]:
    """Return at most `length` ids; the last one stays, because it ends the text."""
    return ids if len(ids) <= length else [*ids[: length - 1], ids[-1]]
