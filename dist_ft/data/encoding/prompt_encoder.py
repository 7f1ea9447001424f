"""Rows to prompts for a model that is asked for labels: the tokens of the prompt, the label on its first position.

Guarantees: a text that is too long loses its end (data.overlong=truncate), never the prompt around it; there is always
room for the words of every label. The words themselves are the model's business (`model.prompted`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from typing_extensions import override

from dist_ft.config import renames
from dist_ft.config.schema import DataSection, PromptingSection, TaskSection
from dist_ft.core.errors import ConfigError
from dist_ft.data.batch import IGNORE_INDEX
from dist_ft.data.encoding.fast_tokenizer import exact_backend
from dist_ft.data.encoding.prompt_templates import (
    CONTENT_FREE_TEXTS,
    LabelWords,
    fill_template,
    tokenize_label,
    verbalize,
)
from dist_ft.data.encoding.task_encoder import LabeledTokens, TaskEncoder
from dist_ft.data.encoding.task_rows import Sample
from dist_ft.data.sources.discovery import row_error


class PromptEncoder(TaskEncoder):
    """Turns rows into prompts by the first template, whose examples are in it already (`runtime.prompting`)."""

    def __init__(
        self,
        tokenizer: Any,
        data: DataSection,
        task: TaskSection,
        prompting: PromptingSection,
        sequence_length: int,
    ) -> None:
        """Assign only; `task.labels` are those that are chosen among."""
        super().__init__(tokenizer, data, task, sequence_length)
        self._prompting = prompting
        self._asked = prompting.templates[0]
        self.recipe = {
            **self.recipe,
            # Runs store a hash of this: it has the field names of 0.1.0.
            "prompting": renames.RUN.restore(
                prompting.model_dump(mode="json", exclude={"max_new_tokens"}), "prompting"
            ),
        }
        self._words: LabelWords | None = None

    def words(self) -> LabelWords:
        """Return the words of all labels as tokens."""
        if self._words is None:
            backend = exact_backend(self.tokenizer)
            ids = tuple(
                tokenize_label(backend, self._asked, verbalize(label, self._prompting))
                for label in self.task.labels
            )
            twice = next((place for place, own in enumerate(ids) if own in ids[:place]), None)
            if twice is not None:
                raise ConfigError(
                    [
                        f"prompting.verbalizers: {self.task.labels[twice]} has the tokens of another label; "
                        "each needs its own; change its words"
                    ],
                    "prompting",
                )
            empty = [
                self._prompt(Sample(text, text)) for text in CONTENT_FREE_TEXTS if self._prompting.calibrate
            ]
            self._words = LabelWords(
                ids, tuple(tuple(own) for own in empty), self._prompting.normalize == "mean"
            )
        return self._words

    def prompts(self, samples: Sequence[Sample]) -> list[list[int] | None]:
        """Return the ids of each prompt; None where the prompt leaves its text no room."""
        return self._tokenise(samples)

    @override
    def _tokenise(self, samples: Sequence[Sample]) -> list[Any]:
        """Return the ids of each prompt; None where the prompt leaves its text no room."""
        self._backend = self._backend or exact_backend(self.tokenizer)
        before, _ = self._frame()
        texts = [fill_template(self._asked, one.first, one.second) for one in samples]
        found = [
            [*before, *one.ids]
            for one in self._backend.encode_batch(texts, add_special_tokens=False)
        ]
        room = self.sequence_length - self.words().longest
        if self.data.overlong != "truncate":
            return found
        return [
            ids if len(ids) <= room else self._cut(sample, room)
            for ids, sample in zip(found, samples, strict=True)
        ]

    @override
    def _labelled(self, encoding: Any, sample: Sample, url: str, number: int) -> LabeledTokens:
        room = self.sequence_length - self.words().longest
        if encoding is None or (self.data.overlong == "error" and len(encoding) > room):
            told = (
                "its prompt is longer without any text of the row"
                if encoding is None
                else (f"its prompt has {len(encoding)} tokens")
            )
            raise row_error(
                url,
                number,
                f"{told}; {room} are allowed (batch.sequence_length={self.sequence_length} "
                "less the longest label); raise the length, show fewer examples, or set "
                "data.overlong=truncate",
            )
        labels = np.full(len(encoding), IGNORE_INDEX, np.int32)
        labels[:1] = sample.label
        if not encoding:
            raise row_error(url, number, "gives no token; text is needed; remove the row")
        if len(encoding) <= room:
            return encoding, labels
        missing = (
            self.sequence_length + 1 - len(encoding)
        )  # overlong=drop: too long for the plan too, which counts it
        return encoding + encoding[-1:] * missing, np.concatenate(
            [labels, np.full(max(0, missing), IGNORE_INDEX, np.int32)]
        )

    def _prompt(self, sample: Sample) -> list[int]:
        """Return the tokens of one prompt."""
        backend, (before, _) = exact_backend(self.tokenizer), self._frame()
        return [
            *before,
            *backend.encode(
                fill_template(self._asked, sample.first, sample.second), add_special_tokens=False
            ).ids,
        ]

    def _cut(self, sample: Sample, room: int) -> list[int] | None:
        """Return the tokens of a prompt whose texts lose so much of their ends that it fits; the longer one first."""
        texts = [sample.first, sample.second or ""]
        while True:
            ids = self._prompt(Sample(*texts))
            over = len(ids) - room
            if over <= 0:
                return ids
            encoded = [self._backend.encode(text, add_special_tokens=False) for text in texts]
            longer = max((0, 1), key=lambda which: len(encoded[which].ids))
            offsets = encoded[longer].offsets
            if not offsets:
                return None
            keep = max(0, len(offsets) - over)
            end = offsets[keep - 1][1] if keep else 0
            texts[longer] = texts[longer][: min(end, len(texts[longer]) - 1)]
