"""What the data pipeline needs of a task: how a row becomes tokens and labels.

`TaskEncoder` calls the methods here in this order, for each chunk of rows: `read` for each row;
`set_truncation`, for the first chunk only; `tokenize` once; `label_tokens` for each sample.

T is the number of tokens of a sample.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol, cast

import numpy as np

from dist_ft.config.schema import ColumnsSection, DataSection, RunConfig, TaskSection
from dist_ft.config.task_facts import TaskFacts, task_class
from dist_ft.data.batch import IGNORE_INDEX
from dist_ft.data.encoding import task_rows
from dist_ft.data.encoding.task_rows import Sample
from dist_ft.data.sources.discovery import Row, RowLocation


class RowEncoder(Protocol):
    """The encoder that calls a task (`TaskEncoder`).

    Attributes:
        tokenizer: of the model.
        data: the section `data` of the config.
        sequence_length: most tokens of a sequence.
        untruncated_backend: the tokenizer's backend without truncation.
    """

    tokenizer: Any
    data: DataSection
    sequence_length: int

    @property
    def untruncated_backend(self) -> Any:
        """The tokenizer's backend without truncation."""


class LabeledTokens(NamedTuple):
    """The tokens of a sample.

    Attributes:
        ids: T token ids.
        labels: (T,) int32: the label of each token, or `IGNORE_INDEX`.
    """

    ids: list[int]
    labels: np.ndarray


class DataTask(TaskFacts, ABC):
    """How a task reads and labels rows.

    Attributes:
        section: the section `task` of the config, with labels.
        label_ids: the number of each label.
    """

    keeps_texts_apart: ClassVar[bool] = False
    """A row has two texts, which the model gets as two inputs, not as a pair in one."""
    version: ClassVar[int] = 0
    """Raise it when `read` or `label_tokens` change: stored tokens are then made anew."""
    has_label_per_word: ClassVar[bool] = False
    """Labels belong to words, whose tokens may change together with them."""
    masks_tokens: ClassVar[bool] = False
    """Which tokens are targets is drawn for each batch (`Masking`)."""

    def __init__(self, section: TaskSection) -> None:
        """Assign only."""
        self.section = section
        self.label_ids = {label: number for number, label in enumerate(section.labels)}

    @classmethod
    def check(cls, config: RunConfig) -> Iterator[str]:
        """Yield the problems of a config that only this task has."""
        yield from ()

    @property
    def name(self) -> str:
        """The name of the task."""
        return self.section.name

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels, in the order of the head's outputs."""
        return self.section.labels

    @property
    def columns(self) -> ColumnsSection:
        """The names of the columns."""
        return self.section.columns

    @abstractmethod
    def read(self, row: Row, location: RowLocation) -> Sample:
        """Return the texts and the label of a row.

        Raises:
            DataError: a column is missing or holds something else; `location.error` makes it.
        """

    def recipe(self) -> Mapping[str, str | int]:
        """Return what else decides the tokens and labels of a row; stored with them."""
        return {"version": self.version} if self.version else {}

    def read_label_names(self, row: Row, location: RowLocation) -> list[str]:
        """Return the names of the labels in a row, for a task whose outputs are labels."""
        column = self.columns.label
        value = task_rows.get_value(row, column, "label", location)
        return [] if value is None else [str(value)]

    def read_text(self, row: Row, column: str, location: RowLocation) -> str:
        """Return the text in a column of a row; it must not be blank."""
        return task_rows.read_text(row, column, None, location)

    def text_columns(self) -> tuple[str, ...]:
        """Return the columns whose texts may get typos or other names."""
        columns = self.columns
        return (columns.text,) if columns.pair is None else (columns.text, columns.pair)

    def set_truncation(self, backend: Any, encoder: RowEncoder) -> None:
        """Set how the tokenizer truncates a long row."""
        if encoder.data.overlong != "truncate":
            return
        if self.keeps_texts_apart:
            backend.enable_truncation(encoder.sequence_length // 2)
        else:
            backend.enable_truncation(encoder.sequence_length, strategy="longest_first")

    def tokenize(self, samples: Sequence[Sample], backend: Any, encoder: RowEncoder) -> list[Any]:
        """Return the encoding of each sample, in one call of the tokenizer.

        It is a pair of encodings where the texts stay apart, and None where `explain_no_encoding`
        says why there is none.
        """
        if self.keeps_texts_apart:
            texts = [text for sample in samples for text in (sample.first, sample.second)]
            encodings = backend.encode_batch(texts)
            return list(zip(encodings[::2], encodings[1::2], strict=True))

        inputs = [
            sample.first if sample.second is None else (sample.first, sample.second)
            for sample in samples
        ]
        return list(backend.encode_batch(inputs))

    def explain_no_encoding(self, encoder: RowEncoder) -> str:
        """Return the error for a sample that `tokenize` returned None for."""
        raise NotImplementedError

    def label_tokens(self, encoding: Any, sample: Sample, encoder: RowEncoder) -> LabeledTokens:
        """Return the tokens of a sample with their labels.

        Where the texts stay apart, the label stands where the second one starts. Else it is on the
        first token.
        """
        if self.keeps_texts_apart:
            first, second = encoding[0].ids, encoding[1].ids
            labels = np.full(len(first) + len(second), IGNORE_INDEX, np.int32)
            labels[len(first)] = 0
            return LabeledTokens([*first, *second], labels)

        labels = np.full(len(encoding.ids), IGNORE_INDEX, np.int32)
        labels[:1] = sample.label
        return LabeledTokens(encoding.ids, labels)

    def num_label_tokens(self) -> int:
        """Return how many tokens a sample needs to hold its label."""
        return 1

    def describe_targets(self, targets: np.ndarray) -> str:
        """Return the labels (T,) of a sample as text, for previews."""
        if not self.labels:
            return ""
        names = np.array(self.labels, dtype=object)
        return " ".join(names[targets[targets != IGNORE_INDEX]])


def data_task(section: TaskSection) -> DataTask:
    """Return the task of a section."""
    return cast("DataTask", task_class(section.name)(section))
