"""Rows to tokens and labels for the tasks that are no continuation of text.

A sample is one run of tokens with a label each, `IGNORED` where the task wants nothing: what the label means is the
task's own (`Labeller`s below), how many there are is the sample's weight. The tokenizer's own special tokens frame it.
Guarantees: a label the head does not know, tags that break BIO and answers that are not in their text are refused by
shard and row; sub-words of a word have one label; long contexts become windows, each of `batch.sequence_length` tokens
but the last. Tokenisation is one batched call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dist_ft.config import renames
from dist_ft.config.schema import DataSection, TaskSection
from dist_ft.core.errors import DataError, ModelError
from dist_ft.data.batch import IGNORE_INDEX
from dist_ft.data.encoding import answer_spans, task_rows
from dist_ft.data.encoding.chat import (
    CHUNK_ROWS,
    Encoder,
)
from dist_ft.data.encoding.encoded import (
    EncodedRows,
)
from dist_ft.data.encoding.fast_tokenizer import exact_backend
from dist_ft.data.encoding.task_rows import Sample
from dist_ft.data.sources.discovery import Row, row_error

LABELS_PER_POSITION = 30
"""multi_label: so many labels share one int32."""

LabeledTokens = tuple[list[int], np.ndarray]
"""Token ids (T,) and labels int32 (T,) of a sample."""


def uses_windows(task: TaskSection, overlong: str) -> bool:
    """Tell whether a long row goes on in further sequences."""
    return task.name == "question_answering" or (task.name == "masked_lm" and overlong == "split")


def add_leading_spaces(sentences: Sequence[Sequence[str]], backend: str) -> list[list[str]]:
    """Return words as a tokenizer wants them: with a byte-level `backend` (JSON) each brings the blank before it."""
    apart = "ByteLevel" in backend
    return [
        [(" " if apart and i else "") + word for i, word in enumerate(words)] for words in sentences
    ]


class TaskEncoder(Encoder):
    """Turns rows into tokens and labels."""

    def __init__(
        self, tokenizer: Any, data: DataSection, task: TaskSection, sequence_length: int
    ) -> None:
        """Assign only; `task.labels` are those of the head."""
        super().__init__(tokenizer, data)
        self.task = task
        self.sequence_length = sequence_length
        self.recipe = {
            "task": renames.RUN.restore(
                task.model_dump(mode="json", include=set(_DECIDING)), "task"
            ),
            "overlong": data.overlong,
            "sequence_length": sequence_length,
            **({"labels": "spans"} if task.name == "question_answering" else {}),
        }
        self._measure: Any = None
        self._ids = {label: number for number, label in enumerate(task.labels)}

    def encode(self, rows: Any, shard_url: str, first: int = 1) -> EncodedRows:
        """Return tokens and labels of `rows`; see `Encoder.encode`."""
        rows = rows if isinstance(rows, list) else rows.to_pylist()
        bad: list[str] = []
        found: list[LabeledTokens] = []
        for start in range(0, len(rows), CHUNK_ROWS):
            found += self._encode_rows(
                rows[start : start + CHUNK_ROWS], shard_url, start + first, bad
            )
        lengths = [len(ids) for ids, _ in found]
        total, offsets = sum(lengths), np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        tokens = np.fromiter((token for ids, _ in found for token in ids), np.int32, total)
        labels = np.concatenate([own for _, own in found]) if found else np.zeros(0, np.int32)
        return EncodedRows(
            tokens, labels, offsets, self.task.name if rows else "", (len(rows),), tuple(bad)
        )

    def shown(self, targets: np.ndarray) -> str:
        """Return the labels of a sample; see `Encoder.shown`."""
        names, found = np.array(self.task.labels, dtype=object), targets[targets != IGNORE_INDEX]
        if self.task.name == "regression":
            return f"{found[:1].view(np.float32)[0]:g}"
        if self.task.name == "multi_label":
            numbers = np.arange(len(names))
            return (
                ", ".join(names[(found[numbers // LABELS_PER_POSITION] >> (numbers % LABELS_PER_POSITION) & 1).astype(bool)])
                or "no label"
            )
        return " ".join(names[found]) if len(names) else ""

    def _encode_rows(
        self, rows: Sequence[Row | DataError], url: str, first: int, bad: list[str]
    ) -> list[LabeledTokens]:
        """Return the samples of some rows; one that can not be used, if the config allows it, has no tokens."""
        samples: dict[int, Sample] = {}
        found: list[LabeledTokens] = [([], np.zeros(0, np.int32))] * len(rows)

        def into(found: Any, number: int, action: Callable[..., Any], *values: Any) -> None:
            try:
                found[number] = action(*values, url, first + number)
            except DataError as error:
                if self.data.bad_rows == "error":
                    raise
                bad.append(str(error))

        for number, row in enumerate(rows):
            into(samples, number, self._read, row)
        encodings = self._tokenise(list(samples.values()))
        for (number, sample), encoding in zip(samples.items(), encodings, strict=True):
            into(found, number, self._labelled, encoding, sample)
        return found

    def _read(self, row: Row | DataError, url: str, number: int) -> Sample:
        if isinstance(row, DataError):
            raise row
        return task_rows.READERS[self.task.name](row, self.task, self._ids, url, number)

    def _labelled(self, encoding: Any, sample: Sample, url: str, number: int) -> LabeledTokens:
        if encoding is None:
            raise row_error(
                url,
                number,
                "its question leaves no room for its context in batch.sequence_length="
                f"{self.sequence_length} with task.stride={self.task.stride}; a shorter one "
                "is needed; raise the length, or remove the row",
            )
        ids, labels = LABELERS[self.task.name](encoding, sample, self)
        if not ids:
            raise row_error(url, number, "gives no token; text is needed; remove the row")
        words = -(-len(self._ids) // LABELS_PER_POSITION)
        if self.task.name == "multi_label" and len(ids) < words:
            raise row_error(
                url,
                number,
                f"has {len(ids)} tokens; with {len(self._ids)} labels {words} are needed; "
                "remove the row",
            )
        return ids, labels

    def _tokenise(self, samples: Sequence[Sample]) -> list[Any]:
        """Return the encoding of each sample, or a pair of them where its two texts stay apart."""
        self._backend = self._backend or self._prepared()
        if not samples:
            return []
        if self.task.name in ("seq2seq", "embedding"):
            both = self._backend.encode_batch(
                [text for one in samples for text in (one.first, one.second)]
            )
            return list(zip(both[::2], both[1::2], strict=True))
        if self.task.name == "token_classification":
            words = add_leading_spaces([one.first for one in samples], self._backend.to_str())
            return list(self._backend.encode_batch(words, is_pretokenized=True))
        texts = [one.first if one.second is None else (one.first, one.second) for one in samples]
        if self.task.name == "question_answering":
            return [self._windows_of(text) for text in texts]
        return list(self._backend.encode_batch(texts))

    def _windows_of(self, texts: Any) -> Any:
        """Return the windows of a question and its context; None where the question leaves no room for one.

        Asked first: tokenizers would end the whole process's patience with a panic, which is no Exception.
        """
        self._measure = self._measure or exact_backend(self.tokenizer)
        room = self.sequence_length - len(self._measure.encode(texts[0], "").ids)
        return self._backend.encode(*texts) if room > self.task.stride else None

    def _prepared(self) -> Any:
        """Return the tokenizer's backend, cutting as the task and data.overlong say."""
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
                "task.name=masked_lm: the tokenizer has no mask token; encoders such as BERT bring one; "
                "choose such a model, or task.name=causal_lm"
            )
        return backend


_DECIDING = ("name", "columns", "labels", "stride")
"""Fields of the task section that decide the tokens and labels of a row."""


def _first(encoding: Any, sample: Sample, encoder: TaskEncoder) -> LabeledTokens:
    """One label, carried by the first position."""
    labels = np.full(len(encoding.ids), IGNORE_INDEX, np.int32)
    labels[:1] = sample.label
    return encoding.ids, labels


def _bits(encoding: Any, sample: Sample, encoder: TaskEncoder) -> LabeledTokens:
    """A set of labels as bits, BITS of them a position from the first on."""
    labels = np.full(len(encoding.ids), IGNORE_INDEX, np.int32)
    words = np.zeros(-(-len(encoder.task.labels) // LABELS_PER_POSITION), np.int32)
    for label in sample.label:
        words[label // LABELS_PER_POSITION] |= np.int32(1 << label % LABELS_PER_POSITION)
    labels[: len(words)] = words[: len(labels)]
    return encoding.ids, labels


def _by_word(encoding: Any, sample: Sample, encoder: TaskEncoder) -> LabeledTokens:
    """The tag of a word on the first of its tokens."""
    words = np.array([-1 if word is None else word for word in encoding.word_ids], dtype=np.int64)
    labels = np.full(len(words), IGNORE_INDEX, np.int32)
    seen, places = np.unique(words, return_index=True)
    labels[places[seen >= 0]] = np.asarray(sample.label, np.int32)[seen[seen >= 0]]
    return encoding.ids, labels


def _windows(encoding: Any, sample: Sample, encoder: TaskEncoder) -> LabeledTokens:
    """In each window what `spans` says, on the answer's first token; on the first of all where there is none."""
    ids: list[int] = []
    labels = []
    for window in (encoding, *encoding.overflowing):
        own = np.full(len(window.ids), IGNORE_INDEX, np.int32)
        start, stop = sample.label or (0, 0)
        first = window.char_to_token(start, 1) if stop else None
        last = window.char_to_token(stop - 1, 1) if stop else None
        if first is None or last is None:
            first = last = 0
        own[first] = answer_spans.pack(
            answer_spans.AnswerSpan(last, *answer_spans.find_context(window.sequence_ids))
        )
        ids += window.ids
        labels.append(own)
    return ids, np.concatenate(labels)


def _whole(encoding: Any, sample: Sample, encoder: TaskEncoder) -> LabeledTokens:
    """Every token that is none of the tokenizer's own; which are masked is drawn when batches are made."""
    ids: list[int] = []
    labels = []
    for window in (encoding, *encoding.overflowing):
        own = np.array(window.ids, np.int32)
        ids += window.ids
        labels.append(np.where(np.array(window.special_tokens_mask, bool), np.int32(IGNORE_INDEX), own))
    return ids, np.concatenate(labels)


def _target(pair: tuple[Any, Any], sample: Sample, encoder: TaskEncoder) -> LabeledTokens:
    """The source, then the target, whose labels are its tokens."""
    source, target = pair[0].ids, pair[1].ids
    length = encoder.sequence_length
    if encoder.data.overlong == "truncate" and len(source) + len(target) > length:
        target = _cut(target, max(length // 2, length - len(source)))
        source = _cut(source, length - len(target))
    return [*source, *target], np.array([IGNORE_INDEX] * len(source) + target, np.int32)


def _cut(ids: list[int], length: int) -> list[int]:
    """Return at most `length` ids, of which the last stays: it ends the text."""
    return ids if len(ids) <= length else [*ids[: length - 1], ids[-1]]


def _pair(pair: tuple[Any, Any], sample: Sample, encoder: TaskEncoder) -> LabeledTokens:
    """Both texts; where the second begins is labelled."""
    first, second = pair[0].ids, pair[1].ids
    labels = np.full(len(first) + len(second), IGNORE_INDEX, np.int32)
    labels[len(first)] = 0
    return [*first, *second], labels


LABELERS: dict[str, Callable[[Any, Sample, TaskEncoder], LabeledTokens]] = {
    "sequence_classification": _first,
    "regression": _first,
    "multi_label": _bits,
    "token_classification": _by_word,
    "question_answering": _windows,
    "masked_lm": _whole,
    "seq2seq": _target,
    "embedding": _pair,
}
"""What each task puts where."""
