"""token_classification: a tag for each word.

Dimensions: B rows of a batch, T tokens of a row, K tags.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from typing_extensions import override

from dist_ft.data.batch import IGNORE_INDEX
from dist_ft.data.encoding import task_rows
from dist_ft.data.encoding.data_task import LabeledTokens, RowEncoder
from dist_ft.data.encoding.task_rows import OUTSIDE_TAG, Sample
from dist_ft.data.sources.discovery import Row, RowLocation
from dist_ft.metrics import task_scores
from dist_ft.metrics.task_scores import TaskScores, softmax
from dist_ft.model.model_task import LossAndOutputs, TaskAbility, TaskInputs, TaskModule
from dist_ft.tasks.base import ModelRunner, Task
from dist_ft.tasks.inference_rows import read_inference_text
from dist_ft.tasks.results import (
    Description,
    PredictionError,
    PredictionRow,
    RowResult,
    Windows,
    decode_tokens,
)


def add_leading_spaces(sentences: Sequence[Sequence[str]], backend: str) -> list[list[str]]:
    """Return words as a tokenizer expects them.

    With a byte-level `backend` (JSON), each word but the first gets the space before it.
    """
    if "ByteLevel" not in backend:
        return [list(words) for words in sentences]

    spaced = []
    for words in sentences:
        spaced.append([*words[:1], *(f" {word}" for word in words[1:])])
    return spaced


class TokenClassification(Task):
    """Tag words.

    A word's tag is on its first token; its other tokens have no label. Outputs are logits
    (B, T, K).
    """

    fields = ("labels", "new_head", "grow_head", "class_weights", "focal_gamma")
    metrics = ("accuracy", "precision", "recall", "f1")
    has_labels = True
    has_head = True
    allows_augmentation = True
    allows_typos = True
    has_probabilities = True
    prompting_methods = ("generation",)
    virtual_token_type = "TOKEN_CLS"
    auto_class = "AutoModelForTokenClassification"
    ability = TaskAbility("tag words")
    describes_errors = True
    has_label_per_word = True

    @override
    def read(self, row: Row, location: RowLocation) -> Sample:
        """Return the words of a row and the number of each word's tag."""
        columns = self.columns
        words = self._read_list(row, columns.tokens, "tokens", "words", location)
        values = self._read_list(row, columns.tags, "tags", "tags", location)
        if not words:
            raise location.error(
                f"{columns.tokens} is empty. At least one word is needed. Remove the row."
            )

        if len(words) != len(values):
            raise location.error(
                f"has {len(words)} words in {columns.tokens} but {len(values)} tags in "
                f"{columns.tags}. Each word needs one tag. Repair the row."
            )

        tags = [str(value) for value in values]
        if task_rows.is_bio(self.label_ids):
            for index in task_rows.find_broken_bio(tags):
                before = tags[index - 1] if index else "nothing"
                raise location.error(
                    f"tag {index + 1} of {columns.tags} is {tags[index]} after {before}. In BIO, "
                    "I- continues an entity that B- of the same kind started. Repair the row."
                )

        return Sample(
            [task_rows.require_not_blank(word, columns.tokens, location) for word in words],
            None,
            [task_rows.get_label_id(tag, self.label_ids, columns.tags, location) for tag in tags],
        )

    def _read_list(
        self, row: Row, column: str, field: str, items: str, location: RowLocation
    ) -> list[Any]:
        value = task_rows.get_value(row, column, field, location)
        return task_rows.require_list(value, column, items, location)

    @override
    def read_label_names(self, row: Row, location: RowLocation) -> list[str]:
        column = self.columns.tags
        value = task_rows.get_value(row, column, "tags", location)
        tags = task_rows.require_list(value, column, "labels", location)
        return [str(tag) for tag in tags if tag is not None]

    @override
    def text_columns(self) -> tuple[str, ...]:
        return (self.columns.tokens,)

    @override
    def tokenize(self, samples: Sequence[Sample], backend: Any, encoder: RowEncoder) -> list[Any]:
        words = add_leading_spaces([sample.first for sample in samples], backend.to_str())
        return list(backend.encode_batch(words, is_pretokenized=True))

    @override
    def label_tokens(self, encoding: Any, sample: Sample, encoder: RowEncoder) -> LabeledTokens:
        # word_ids: (T,) the word of each token; special tokens belong to none
        word_ids = np.array([-1 if word is None else word for word in encoding.word_ids], np.int64)
        words, first_tokens = np.unique(word_ids, return_index=True)
        is_word = words >= 0

        tags = np.asarray(sample.label, np.int32)
        labels = np.full(len(word_ids), IGNORE_INDEX, np.int32)
        labels[first_tokens[is_word]] = tags[words[is_word]]
        return LabeledTokens(encoding.ids, labels)

    @override
    def compute_loss(self, model: TaskModule, inputs: TaskInputs) -> LossAndOutputs:
        logits = model.drop_virtual_tokens(model.run_model(inputs.ids, inputs.mask).logits)
        loss = model.weighted_cross_entropy(logits.flatten(0, 1), inputs.labels.flatten())
        return LossAndOutputs(loss, logits)

    @override
    def read_output(self, labels: np.ndarray, output: np.ndarray) -> RowResult:
        """Return the tags of the words, and (the predicted tags, their probabilities)."""
        is_word = labels != IGNORE_INDEX
        logits = output[: len(labels)][is_word]  # (words, K)
        probabilities = softmax(logits.astype(float)).max(-1)
        return RowResult(labels[is_word], (logits.argmax(-1), probabilities))

    @override
    def compute_scores(self, expected: Sequence[Any], predicted: Sequence[Any]) -> TaskScores:
        tags = [tags for tags, _ in predicted]
        return task_scores.token_classification(self.labels, expected, tags)

    @override
    def find_error(self, row: PredictionRow) -> PredictionError | None:
        tags, probabilities = row.predicted
        is_wrong = tags != row.expected
        if not is_wrong.any():
            return None
        confidence = float(probabilities[is_wrong].max())
        return PredictionError(row.sample, confidence, row.window, row.expected, tags)

    @override
    def describe_error(
        self, error: PredictionError, windows: Windows, tokenizer: Any
    ) -> Description:
        """List the words whose tags are wrong, with the expected and the predicted tags."""
        ids, labels = windows[error.sample, error.window]
        starts = np.flatnonzero(labels != IGNORE_INDEX)  # first token of each word
        stops = np.append(starts[1:], len(ids))

        expected, predicted, at = [], [], []
        for word in np.flatnonzero(error.expected != error.predicted):
            text = decode_tokens(tokenizer, ids[starts[word] : stops[word]])
            expected.append(f"{text}: {self.labels[error.expected[word]]}")
            predicted.append(f"{text}: {self.labels[error.predicted[word]]}")
            at.append([int(starts[word]), int(error.predicted[word])])
        return Description("; ".join(expected), "; ".join(predicted), at)

    @override
    def score_for_attribution(self, outputs: Any, at: list[Any]) -> Any:
        return sum(outputs.logits[:, token, tag] for token, tag in at)

    @override
    def decide(self, predicted: Any) -> Any:
        """Return the tags of the words."""
        return predicted[0]

    @override
    def predict(self, model: ModelRunner, rows: Sequence[Row]) -> Iterable[dict[str, Any]]:
        words = []
        for row in rows:
            has_words = "tokens" in row
            words.append(row["tokens"] if has_words else read_inference_text(row, "text").split())

        spaced = add_leading_spaces(words, model.tokenizer.backend_tokenizer.to_str())
        encoded = model.encode(spaced, is_split_into_words=True)
        outputs = model.forward(encoded)
        logits = model.without_virtual(outputs.logits).float().cpu().numpy()  # (B, T, K)
        default = OUTSIDE_TAG if OUTSIDE_TAG in self.labels else self.labels[0]
        for number, row_words in enumerate(words):
            tags = [default] * len(row_words)
            word_of_token = encoded.word_ids(number)
            # backwards, so that the first token of a word decides, as in training
            for token in reversed(range(len(word_of_token))):
                word = word_of_token[token]
                if word is not None:
                    tags[word] = self.labels[int(logits[number, token].argmax())]
            yield {"tokens": row_words, "tags": tags}
