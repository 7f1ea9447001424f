"""Encode rows as tokens and labels, for the tasks that do not continue text.

A sample is one sequence of tokens with a label for each, `IGNORE_INDEX` where the task needs none.
The task defines what a label means (`LABELERS` below). The number of labels is the weight of the
sample. The tokenizer adds its own special tokens around the sample. Guarantees: a label unknown to
the head, tags that break BIO and answers that are not in their text are refused with shard and row;
the sub-words of a word have one label; long contexts become windows, each of
`batch.sequence_length` tokens but the last. Rows are tokenized in batched calls.

T is the number of tokens of a sample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from dist_ft.config import renames
from dist_ft.config.schema import DataSection, TaskSection
from dist_ft.core.errors import DataError, ModelError
from dist_ft.data.batch import IGNORE_INDEX
from dist_ft.data.encoding import answer_spans, task_rows
from dist_ft.data.encoding.chat import CHUNK_ROWS, Encoder
from dist_ft.data.encoding.encoded import EncodedRows
from dist_ft.data.encoding.fast_tokenizer import exact_backend
from dist_ft.data.encoding.task_rows import Sample
from dist_ft.data.sources.discovery import Row, RowLocation

LABELS_PER_POSITION = 30
"""multi_label: how many labels share one int32, one bit each."""


class LabeledTokens(NamedTuple):
    """The tokens of a sample.

    Attributes:
        ids: T token ids.
        labels: (T,) int32: the label of each token, or `IGNORE_INDEX`.
    """

    ids: list[int]
    labels: np.ndarray


def uses_windows(task: TaskSection, overlong: str) -> bool:
    """Return whether a long row continues in further sequences."""
    return task.name == "question_answering" or (task.name == "masked_lm" and overlong == "split")


def add_leading_spaces(sentences: Sequence[Sequence[str]], backend: str) -> list[list[str]]:
    """Return words as a tokenizer expects them.

    With a byte-level `backend` (JSON), each word but the first gets the space before it.
    """
    if "ByteLevel" not in backend:
        return [list(words) for words in sentences]
    return [
        [word if index == 0 else f" {word}" for index, word in enumerate(words)]
        for words in sentences
    ]


class TaskEncoder(Encoder):
    """Encodes rows as tokens and labels."""

    def __init__(
        self, tokenizer: Any, data: DataSection, task: TaskSection, sequence_length: int
    ) -> None:
        """Assign only; `task.labels` are those of the head."""
        super().__init__(tokenizer, data)
        self.task = task
        self.sequence_length = sequence_length
        self.recipe = {
            # Runs store a hash of this: it has the field names of 0.1.0.
            "task": renames.RUN.restore(
                task.model_dump(mode="json", include=set(_ENCODING_FIELDS)), "task"
            ),
            "overlong": data.overlong,
            "sequence_length": sequence_length,
            **({"labels": "spans"} if task.name == "question_answering" else {}),
        }
        self._untruncated_backend: Any = None
        self._label_ids = {label: number for number, label in enumerate(task.labels)}

    def encode(self, rows: Any, shard_url: str, first: int = 1) -> EncodedRows:
        """Return tokens and labels of `rows`; see `Encoder.encode`."""
        rows = rows if isinstance(rows, list) else rows.to_pylist()
        bad_rows: list[str] = []
        samples: list[LabeledTokens] = []
        for start in range(0, len(rows), CHUNK_ROWS):
            chunk = rows[start : start + CHUNK_ROWS]
            samples += self._encode_rows(chunk, shard_url, start + first, bad_rows)

        lengths = [len(sample.ids) for sample in samples]
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        ids = (token for sample in samples for token in sample.ids)
        tokens = np.fromiter(ids, np.int32, sum(lengths))
        labels = np.zeros(0, np.int32)
        if samples:
            labels = np.concatenate([sample.labels for sample in samples])
        format = self.task.name if rows else ""
        return EncodedRows(tokens, labels, offsets, format, (len(rows),), tuple(bad_rows))

    def describe_targets(self, targets: np.ndarray) -> str:
        """Return the labels of a sample; see `Encoder.describe_targets`."""
        names = np.array(self.task.labels, dtype=object)
        labels = targets[targets != IGNORE_INDEX]
        if self.task.name == "regression":
            return f"{labels[:1].view(np.float32)[0]:g}"
        if self.task.name == "multi_label":
            word_of_label, bit_of_label = np.divmod(np.arange(len(names)), LABELS_PER_POSITION)
            is_set = (labels[word_of_label] >> bit_of_label & 1).astype(bool)
            return ", ".join(names[is_set]) or "no label"

        return " ".join(names[labels]) if len(names) else ""

    def _encode_rows(
        self, rows: Sequence[Row | DataError], url: str, first: int, bad_rows: list[str]
    ) -> list[LabeledTokens]:
        """Encode some rows; a bad row has no tokens, if data.bad_rows allows it."""
        samples: dict[int, Sample] = {}
        for index, row in enumerate(rows):
            try:
                samples[index] = self._read(row, RowLocation(url, first + index))
            except DataError as error:
                self._raise_or_skip(error, bad_rows)

        # One batched call for all rows that could be read.
        encodings = self._tokenize(list(samples.values()))
        encoded = [LabeledTokens([], np.zeros(0, np.int32))] * len(rows)
        for (index, sample), encoding in zip(samples.items(), encodings, strict=True):
            try:
                encoded[index] = self._label(encoding, sample, RowLocation(url, first + index))
            except DataError as error:
                self._raise_or_skip(error, bad_rows)

        return encoded

    def _raise_or_skip(self, error: DataError, bad_rows: list[str]) -> None:
        """Raise the error of a row under data.bad_rows=error; else add it to `bad_rows`."""
        if self.data.bad_rows == "error":
            raise error
        bad_rows.append(str(error))

    def _read(self, row: Row | DataError, location: RowLocation) -> Sample:
        if isinstance(row, DataError):
            raise row
        return task_rows.READERS[self.task.name](row, self.task, self._label_ids, location)

    def _label(self, encoding: Any, sample: Sample, location: RowLocation) -> LabeledTokens:
        """Return the tokens of a sample with their labels."""
        if encoding is None:
            raise location.error(
                "its question leaves no room for its context in batch.sequence_length="
                f"{self.sequence_length} with task.stride={self.task.stride}. A shorter question "
                "is needed. Raise the length, or remove the row."
            )

        tokens = LABELERS[self.task.name](encoding, sample, self)
        if not tokens.ids:
            raise location.error("gives no token. Text is needed. Remove the row.")
        num_words = -(-len(self._label_ids) // LABELS_PER_POSITION)
        if self.task.name == "multi_label" and len(tokens.ids) < num_words:
            raise location.error(
                f"has {len(tokens.ids)} tokens. {len(self._label_ids)} labels need {num_words}. "
                "Remove the row."
            )

        return tokens

    def _tokenize(self, samples: Sequence[Sample]) -> list[Any]:
        """Return the encoding of each sample, or a pair of them if its two texts stay separate.

        In question answering it is None for a question that leaves no room for its context.
        """
        self._backend = self._backend or self._truncating_backend()
        if not samples:
            return []
        if self.task.name in ("seq2seq", "embedding"):
            texts = [text for sample in samples for text in (sample.first, sample.second)]
            encodings = self._backend.encode_batch(texts)
            return list(zip(encodings[::2], encodings[1::2], strict=True))

        if self.task.name == "token_classification":
            sentences = [sample.first for sample in samples]
            words = add_leading_spaces(sentences, self._backend.to_str())
            return list(self._backend.encode_batch(words, is_pretokenized=True))

        inputs = [
            sample.first if sample.second is None else (sample.first, sample.second)
            for sample in samples
        ]
        if self.task.name == "question_answering":
            return [self._encode_windows(pair) for pair in inputs]
        return list(self._backend.encode_batch(inputs))

    def _encode_windows(self, texts: Any) -> Any:
        """Return the windows of (question, context), or None if there is no room for one.

        Checked first: the tokenizer would panic, which is not an Exception and ends the process.
        """
        self._untruncated_backend = self._untruncated_backend or exact_backend(self.tokenizer)
        question_tokens = len(self._untruncated_backend.encode(texts[0], "").ids)
        room = self.sequence_length - question_tokens
        return self._backend.encode(*texts) if room > self.task.stride else None

    def _truncating_backend(self) -> Any:
        """Return the tokenizer's backend, truncating as the task and data.overlong say."""
        backend, task, length = exact_backend(self.tokenizer), self.task, self.sequence_length
        if task.name == "question_answering":
            backend.enable_truncation(length, stride=task.stride, strategy="only_second")
        elif task.name == "embedding" and self.data.overlong == "truncate":
            backend.enable_truncation(length // 2)
        elif task.name == "masked_lm" and self.data.overlong == "split":
            backend.enable_truncation(length)
        elif task.name != "seq2seq" and self.data.overlong == "truncate":
            backend.enable_truncation(length, strategy="longest_first")

        if task.name == "masked_lm" and self.tokenizer.mask_token_id is None:
            raise ModelError(
                "task.name=masked_lm: the tokenizer has no mask token. Encoders such as BERT "
                "have one. Choose such a model, or task.name=causal_lm."
            )

        return backend


_ENCODING_FIELDS = ("name", "columns", "labels", "stride")
"""Fields of the task section that decide the tokens and labels of a row."""


def _label_first_token(encoding: Any, sample: Sample, encoder: TaskEncoder) -> LabeledTokens:
    """Put the one label on the first token."""
    labels = np.full(len(encoding.ids), IGNORE_INDEX, np.int32)
    labels[:1] = sample.label
    return LabeledTokens(encoding.ids, labels)


def _label_with_bits(encoding: Any, sample: Sample, encoder: TaskEncoder) -> LabeledTokens:
    """Put a set of labels as bits on the first tokens, `LABELS_PER_POSITION` of them on each."""
    num_words = -(-len(encoder.task.labels) // LABELS_PER_POSITION)
    words = np.zeros(num_words, np.int32)
    for label in sample.label:
        word, bit = divmod(label, LABELS_PER_POSITION)
        words[word] |= np.int32(1 << bit)

    labels = np.full(len(encoding.ids), IGNORE_INDEX, np.int32)
    labels[:num_words] = words[: len(labels)]
    return LabeledTokens(encoding.ids, labels)


def _label_words(encoding: Any, sample: Sample, encoder: TaskEncoder) -> LabeledTokens:
    """Put the tag of each word on its first token."""
    # word_ids: (T,) the word of each token; special tokens belong to none
    word_ids = np.array([-1 if word is None else word for word in encoding.word_ids], np.int64)
    words, first_tokens = np.unique(word_ids, return_index=True)
    is_word = words >= 0

    tags = np.asarray(sample.label, np.int32)
    labels = np.full(len(word_ids), IGNORE_INDEX, np.int32)
    labels[first_tokens[is_word]] = tags[words[is_word]]
    return LabeledTokens(encoding.ids, labels)


def _label_windows(encoding: Any, sample: Sample, encoder: TaskEncoder) -> LabeledTokens:
    """Put the packed span of `answer_spans` on the answer's first token of each window.

    It is on the window's first token if the window does not hold the whole answer.
    """
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


def _label_all_tokens(encoding: Any, sample: Sample, encoder: TaskEncoder) -> LabeledTokens:
    """Label every token with itself, except special tokens; which are masked is drawn per batch."""
    ids: list[int] = []
    labels = []
    for window in (encoding, *encoding.overflowing):
        is_special = np.array(window.special_tokens_mask, bool)
        labels.append(np.where(is_special, np.int32(IGNORE_INDEX), np.array(window.ids, np.int32)))
        ids += window.ids

    return LabeledTokens(ids, np.concatenate(labels))


def _label_target(pair: tuple[Any, Any], sample: Sample, encoder: TaskEncoder) -> LabeledTokens:
    """Put the source before the target; the labels are the tokens of the target."""
    source, target = pair[0].ids, pair[1].ids
    length = encoder.sequence_length
    is_too_long = len(source) + len(target) > length
    if is_too_long and encoder.data.overlong == "truncate":
        # The source loses its end first: the target keeps at least half of the sequence.
        target_room = max(length // 2, length - len(source))
        target = _truncate(target, target_room)
        source = _truncate(source, length - len(target))

    labels = np.array([IGNORE_INDEX] * len(source) + target, np.int32)
    return LabeledTokens([*source, *target], labels)


def _truncate(ids: list[int], length: int) -> list[int]:
    """Return at most `length` ids; the last one stays, because it ends the text."""
    return ids if len(ids) <= length else [*ids[: length - 1], ids[-1]]


def _label_second_start(
    pair: tuple[Any, Any], sample: Sample, encoder: TaskEncoder
) -> LabeledTokens:
    """Put both texts in one sequence; the label marks where the second starts."""
    first, second = pair[0].ids, pair[1].ids
    labels = np.full(len(first) + len(second), IGNORE_INDEX, np.int32)
    labels[len(first)] = 0
    return LabeledTokens([*first, *second], labels)


LABELERS: dict[str, Callable[[Any, Sample, TaskEncoder], LabeledTokens]] = {
    "sequence_classification": _label_first_token,
    "regression": _label_first_token,
    "multi_label": _label_with_bits,
    "token_classification": _label_words,
    "question_answering": _label_windows,
    "masked_lm": _label_all_tokens,
    "seq2seq": _label_target,
    "embedding": _label_second_start,
}
"""How each task labels the tokens of a sample."""
