"""Encode rows as tokens and labels, for the tasks that do not continue text.

A sample is one sequence of tokens with a label for each, `IGNORE_INDEX` where the task needs none.
The task defines what a label means (`DataTask`). The number of labels is the weight of the sample.
The tokenizer adds its own special tokens around the sample. Guarantees: a row that the task cannot
read is refused with shard and row; rows are tokenized in batched calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from dist_ft.config import renames
from dist_ft.config.schema import DataSection, TaskSection
from dist_ft.core.errors import DataError
from dist_ft.data.encoding.chat import CHUNK_ROWS, Encoder
from dist_ft.data.encoding.data_task import LabeledTokens, data_task
from dist_ft.data.encoding.encoded import EncodedRows
from dist_ft.data.encoding.fast_tokenizer import exact_backend
from dist_ft.data.encoding.task_rows import Sample
from dist_ft.data.sources.discovery import Row, RowLocation
from dist_ft.pretrained import tokenizing
from dist_ft.pretrained.tokenizing import UntokenizableError


class TaskEncoder(Encoder):
    """Encodes rows as tokens and labels."""

    def __init__(
        self, tokenizer: Any, data: DataSection, task: TaskSection, sequence_length: int
    ) -> None:
        """Assign only; `task.labels` are those of the head."""
        super().__init__(tokenizer, data)
        self.task = data_task(task)
        self.sequence_length = sequence_length
        self.recipe = {
            # Runs store a hash of this: it has the field names of 0.1.0.
            "task": renames.RUN.restore(
                task.model_dump(mode="json", include=set(_ENCODING_FIELDS)), "task"
            ),
            "overlong": data.overlong,
            "sequence_length": sequence_length,
            **self.task.recipe(),
        }

    @cached_property
    def untruncated_backend(self) -> Any:
        """The tokenizer's backend without truncation."""
        return exact_backend(self.tokenizer)

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
        return self.task.describe_targets(targets)

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
        try:
            encodings = self._tokenize(list(samples.values()))
        except UntokenizableError:
            self._drop_untokenizable(samples, RowLocation(url, first), bad_rows)
            encodings = self._tokenize(list(samples.values()))
        encoded = [LabeledTokens([], np.zeros(0, np.int32))] * len(rows)
        for (index, sample), encoding in zip(samples.items(), encodings, strict=True):
            try:
                encoded[index] = self._label(encoding, sample, RowLocation(url, first + index))
            except DataError as error:
                self._raise_or_skip(error, bad_rows)

        return encoded

    def _drop_untokenizable(
        self, samples: dict[int, Sample], location: RowLocation, bad_rows: list[str]
    ) -> None:
        """Remove the samples that the tokenizer cannot take; `location` is the first row's."""
        for index, sample in list(samples.items()):
            try:
                self._tokenize([sample])
            except UntokenizableError as cause:
                row = RowLocation(location.shard_url, location.number + index)
                problem = f"{tokenizing.describe(cause)}, or set data.bad_rows=skip."
                self._raise_or_skip(row.error(problem), bad_rows)
                del samples[index]

    def _raise_or_skip(self, error: DataError, bad_rows: list[str]) -> None:
        """Raise the error of a row under data.bad_rows=error; else add it to `bad_rows`."""
        if self.data.bad_rows == "error":
            raise error
        bad_rows.append(str(error))

    def _read(self, row: Row | DataError, location: RowLocation) -> Sample:
        if isinstance(row, DataError):
            raise row
        try:
            return self.task.read(row, location)
        except (DataError, MemoryError):
            raise
        except Exception as error:  # of a user's own task
            raise location.error(
                f"task.name={self.task.name} cannot read it ({type(error).__name__}: {error}). "
                "Repair the row, or the task."
            ) from error

    def _label(self, encoding: Any, sample: Sample, location: RowLocation) -> LabeledTokens:
        """Return the tokens of a sample with their labels."""
        if encoding is None:
            raise location.error(self.task.explain_no_encoding(self))

        tokens = self.task.label_tokens(encoding, sample, self)
        if not tokens.ids:
            raise location.error("gives no token. Text is needed. Remove the row.")
        num_needed = self.task.num_label_tokens()
        if len(tokens.ids) < num_needed:
            raise location.error(
                f"has {len(tokens.ids)} tokens. {len(self.task.labels)} labels need {num_needed}. "
                "Remove the row."
            )

        return tokens

    def _tokenize(self, samples: Sequence[Sample]) -> list[Any]:
        """Return what `DataTask.tokenize` does for the samples.

        Raises:
            UntokenizableError: the tokenizer cannot take one of them.
        """
        if self._backend is None:
            backend = exact_backend(self.tokenizer)
            self.task.set_truncation(backend, self)
            self._backend = backend
        if not samples:
            return []
        with tokenizing.tokenizing_errors():
            return self.task.tokenize(samples, self._backend, self)


_ENCODING_FIELDS = ("name", "columns", "labels", "stride")
"""Fields of the task section that decide the tokens and labels of a row."""
