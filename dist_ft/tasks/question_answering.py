"""question_answering: the span of a text that answers a question.

Long contexts become windows, each of `batch.sequence_length` tokens but the last.

Dimensions: B rows of a batch, T tokens of a row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from typing_extensions import override

from dist_ft.data.batch import IGNORE_INDEX
from dist_ft.data.encoding import answer_spans, task_rows
from dist_ft.data.encoding.data_task import LabeledTokens, RowEncoder
from dist_ft.data.encoding.task_rows import Sample
from dist_ft.data.sources.discovery import Row, RowLocation
from dist_ft.metrics import task_scores
from dist_ft.metrics.task_scores import TaskScores
from dist_ft.model.model_task import LossAndOutputs, TaskAbility, TaskInputs, TaskModule
from dist_ft.tasks.answers import AnswerLocation, best_answers, best_span
from dist_ft.tasks.base import ModelRunner, Task
from dist_ft.tasks.inference_rows import read_inference_text
from dist_ft.tasks.results import (
    Description,
    PredictionError,
    PredictionRow,
    Predictions,
    RowResult,
    Windows,
    decode_tokens,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from dist_ft.config.schema import RunConfig

MAX_WINDOW = 16384
"""Tokens of a window whose positions fit into its label."""
MASKED_LOGIT = -1e9
"""Logit of positions that cannot hold an answer."""
MAX_PREDICTED_WINDOW = 384
"""Tokens of a window in `dist-ft predict`."""


class QuestionAnswering(Task):
    """Mark the answer to a question.

    The label of a window is a packed span (`answer_spans`) on the answer's first token, or on the
    window's first token if the window does not hold the whole answer. Outputs are logits of an
    answer's start and end, (B, T, 2).
    """

    fields = ("stride",)
    metrics = ("exact_match", "f1")
    has_head = True
    splits_rows = True
    always_splits = True
    allows_typos = True
    virtual_token_type = "QUESTION_ANS"
    auto_class = "AutoModelForQuestionAnswering"
    ability = TaskAbility("mark answers")
    describes_errors = True

    @override
    @classmethod
    def check(cls, config: RunConfig) -> Iterator[str]:
        length = config.batch.sequence_length
        if length > MAX_WINDOW:
            yield (
                f"batch.sequence_length={length}: windows of task.name=question_answering have at "
                f"most {MAX_WINDOW} tokens. Longer contexts become several windows. Lower it."
            )
        if config.task.stride >= length // 2:
            yield (
                f"task.stride={config.task.stride}: too long for windows of "
                f"batch.sequence_length={length}. Allowed: less than half. Lower it."
            )

    @override
    def recipe(self) -> Mapping[str, str | int]:
        return {**super().recipe(), "labels": "spans"}

    @override
    def read(self, row: Row, location: RowLocation) -> Sample:
        """Return question, context, and the answer's (first character, character after its last).

        The answer is None where the row has none.
        """
        columns = self.columns
        question = task_rows.read_text(row, columns.question, "question", location)
        context = task_rows.read_text(row, columns.context, "context", location)
        answers = task_rows.get_value(row, columns.answers, "answers", location)
        if not isinstance(answers, Mapping) or not {"text", "answer_start"} <= answers.keys():
            raise location.error(
                f"{columns.answers} is not {{text, answer_start}}. It must hold a list of texts "
                "and a list of their first characters. Repair the row."
            )

        texts, starts = (
            task_rows.require_list(answers[name], f"{columns.answers}.{name}", "answers", location)
            for name in ("text", "answer_start")
        )
        if len(texts) != len(starts):
            raise location.error(
                f"{columns.answers} has {len(texts)} texts but {len(starts)} positions. Their "
                "number must be the same. Repair the row."
            )

        if not texts:
            return Sample(question, context, None)

        text, start = texts[0], starts[0]
        task_rows.require_not_blank(text, f"{columns.answers}.text[0]", location)
        # isinstance would accept true and false.
        if type(start) is not int:
            raise location.error(
                f"{columns.answers}.answer_start[0] is a {type(start).__name__}. It must be a "
                "whole number. Repair the row."
            )
        if start < 0 or context[start : start + len(text)] != text:
            raise location.error(
                f"the answer {text!r} is not at character {start} of {columns.context}. It must be "
                "a part of the context. Repair the row."
            )

        # blanks around the answer are not part of it
        start += len(text) - len(text.lstrip())
        return Sample(question, context, (start, start + len(text.strip())))

    @override
    def text_columns(self) -> tuple[str, ...]:
        """Return the question only: the context must still contain the answer."""
        return (self.columns.question,)

    @override
    def set_truncation(self, backend: Any, encoder: RowEncoder) -> None:
        backend.enable_truncation(
            encoder.sequence_length, stride=self.section.stride, strategy="only_second"
        )

    @override
    def tokenize(self, samples: Sequence[Sample], backend: Any, encoder: RowEncoder) -> list[Any]:
        """Return the windows of each sample, or None if its question leaves no room for one.

        Checked first: the tokenizer would panic, which is not an Exception and ends the process.
        """
        encodings = []
        for sample in samples:
            question_tokens = len(encoder.untruncated_backend.encode(sample.first, "").ids)
            has_room = encoder.sequence_length - question_tokens > self.section.stride
            encodings.append(backend.encode(sample.first, sample.second) if has_room else None)
        return encodings

    @override
    def explain_no_encoding(self, encoder: RowEncoder) -> str:
        return (
            "its question leaves no room for its context in batch.sequence_length="
            f"{encoder.sequence_length} with task.stride={self.section.stride}. A shorter question "
            "is needed. Raise the length, or remove the row."
        )

    @override
    def label_tokens(self, encoding: Any, sample: Sample, encoder: RowEncoder) -> LabeledTokens:
        ids: list[int] = []
        labels = []
        start, stop = sample.label or (0, 0)
        for window in (encoding, *encoding.overflowing):
            first = window.char_to_token(start, 1) if stop else None
            last = window.char_to_token(stop - 1, 1) if stop else None
            if first is None or last is None:
                first = last = 0
            context = answer_spans.find_context(window.sequence_ids)
            span = answer_spans.AnswerSpan(last, context.start, context.tail)

            window_labels = np.full(len(window.ids), IGNORE_INDEX, np.int32)
            window_labels[first] = answer_spans.pack(span)
            ids += window.ids
            labels.append(window_labels)

        return LabeledTokens(ids, np.concatenate(labels))

    @override
    def configure(self, config: PretrainedConfig) -> None:
        config.num_labels = 2  # start and end of an answer, whatever head the folder had

    @override
    def compute_loss(self, model: TaskModule, inputs: TaskInputs) -> LossAndOutputs:
        import torch

        from dist_ft.model.losses import loss_sums

        output = model.run_model(inputs.ids, inputs.mask)
        is_labeled = inputs.labels != IGNORE_INDEX
        has_answer = is_labeled.any(1)
        # The label stands at the first token of the answer, and holds its last token.
        first_labeled = is_labeled.long().argmax(1)  # (B,)
        start = torch.where(has_answer, first_labeled, IGNORE_INDEX)
        packed = inputs.labels.gather(1, first_labeled[:, None])[:, 0]
        end = torch.where(has_answer, answer_spans.last_tokens(packed), IGNORE_INDEX)

        is_padding = inputs.mask == 0
        start_logits = model.drop_virtual_tokens(output.start_logits)
        start_logits = start_logits.masked_fill(is_padding, MASKED_LOGIT)
        end_logits = model.drop_virtual_tokens(output.end_logits)
        end_logits = end_logits.masked_fill(is_padding, MASKED_LOGIT)

        start_loss = loss_sums.cross_entropy(start_logits, start)
        end_loss = loss_sums.cross_entropy(end_logits, end)
        loss = (start_loss + end_loss) / 2
        return LossAndOutputs(loss, torch.stack([start_logits, end_logits], -1))

    @override
    def read_output(self, labels: np.ndarray, output: np.ndarray) -> RowResult:
        """Return the answer's (first, last) token, (0, 0) for no answer, and a `Span`."""
        first = int((labels != IGNORE_INDEX).argmax())
        span = answer_spans.unpack(int(labels[first]))
        predicted = best_span(output[: len(labels)], span.context_start, len(labels) - span.tail)
        return RowResult((first, span.last), predicted)

    @override
    def combine_windows(self, rows: Sequence[PredictionRow]) -> Predictions:
        answers = best_answers(rows)
        return Predictions(
            [answer.expected for answer in answers], [answer.predicted for answer in answers]
        )

    @override
    def compute_scores(self, expected: Sequence[Any], predicted: Sequence[Any]) -> TaskScores:
        return task_scores.question_answering(np.array(expected), np.array(predicted))

    @override
    def find_errors(self, rows: Sequence[PredictionRow]) -> list[PredictionError]:
        """Return the questions that are answered wrongly.

        The window shown is that of the predicted answer, else of the expected one, else the first.
        """
        first_window: dict[int, int] = {}
        for row in rows:
            first_window.setdefault(row.sample, row.window)

        errors = []
        for sample, expected, predicted, score in best_answers(rows):
            if expected == predicted:
                continue
            others = tuple(one.window for one in (expected, predicted) if one.window >= 0)
            window = others[-1] if others else first_window[sample]
            errors.append(PredictionError(sample, abs(score), window, expected, predicted, others))

        return errors

    @override
    def describe_error(
        self, error: PredictionError, windows: Windows, tokenizer: Any
    ) -> Description:
        def text(answer: AnswerLocation) -> str:
            if answer.window < 0:
                return "no answer"
            ids = windows[error.sample, answer.window].ids
            return decode_tokens(tokenizer, ids[answer.first : answer.last + 1])

        predicted = error.predicted
        return Description(text(error.expected), text(predicted), [predicted.first, predicted.last])

    @override
    def score_for_attribution(self, outputs: Any, at: list[Any]) -> Any:
        first, last = at
        return outputs.start_logits[:, first] + outputs.end_logits[:, last]

    @override
    def predict(self, model: ModelRunner, rows: Sequence[Row]) -> Iterable[dict[str, Any]]:
        questions = [read_inference_text(row, "question") for row in rows]
        contexts = [read_inference_text(row, "context") for row in rows]
        window_tokens = min(MAX_PREDICTED_WINDOW, model.max_tokens)
        # a long context becomes several overlapping windows
        encoded = model.tokenizer(
            questions,
            contexts,
            padding=True,
            truncation="only_second",
            stride=window_tokens // 4,
            max_length=window_tokens,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            return_tensors="pt",
        )
        row_of_window = encoded.pop("overflow_to_sample_mapping").tolist()
        offsets = encoded.pop("offset_mapping")
        outputs = model.forward(encoded)
        starts = model.without_virtual(outputs.start_logits).float().cpu().numpy()
        ends = model.without_virtual(outputs.end_logits).float().cpu().numpy()
        logits = np.stack([starts, ends], -1)  # (windows, T, 2)

        best_scores, answers = [-np.inf] * len(rows), [""] * len(rows)
        for window, row in enumerate(row_of_window):
            start, tail = answer_spans.find_context(encoded.sequence_ids(window))
            first, last, score = best_span(logits[window], start, logits.shape[1] - tail)
            if score > best_scores[row]:
                best_scores[row] = score
                span = slice(int(offsets[window, first, 0]), int(offsets[window, last, 1]))
                answers[row] = contexts[row][span] if last else ""
        for answer, score in zip(answers, best_scores, strict=True):
            yield {"answer": answer, "score": round(float(score), 4)}
