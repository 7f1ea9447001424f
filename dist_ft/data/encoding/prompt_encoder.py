"""Encode rows as prompts, for a model that scores labels; the label is on the first token.

Guarantees: a text that is too long loses its end (data.overlong=truncate), never the prompt around
it; there is always room for the words of every label. The label words themselves are added by the
model (`model.label_prompting`). Arrays here have one dimension: the tokens of a prompt.
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
from dist_ft.data.sources.discovery import RowLocation
from dist_ft.pretrained.tokenizing import tokenizing_errors


class PromptEncoder(TaskEncoder):
    """Encodes rows as prompts by the first template, which already holds its examples."""

    def __init__(
        self,
        tokenizer: Any,
        data: DataSection,
        task: TaskSection,
        prompting: PromptingSection,
        sequence_length: int,
    ) -> None:
        """Assign only; `task.labels` are the labels to choose from."""
        super().__init__(tokenizer, data, task, sequence_length)
        self._prompting = prompting
        self._template_text = prompting.templates[0]
        self.recipe = {
            **self.recipe,
            # Runs store a hash of this: it has the field names of 0.1.0.
            "prompting": renames.RUN.restore(
                prompting.model_dump(mode="json", exclude={"max_new_tokens"}), "prompting"
            ),
        }
        self._label_words: LabelWords | None = None

    def label_words(self) -> LabelWords:
        """Return the words of all labels as tokens.

        Raises:
            ConfigError: two labels have the same tokens.
        """
        if self._label_words is None:
            self._label_words = self._tokenize_labels()
        return self._label_words

    def encode_prompts(self, samples: Sequence[Sample]) -> list[list[int] | None]:
        """Return the ids of each prompt; None where the prompt leaves no room for its text."""
        return self._tokenize(samples)

    def _tokenize_labels(self) -> LabelWords:
        """Tokenize the words of all labels, and the content-free prompts."""
        backend = exact_backend(self.tokenizer)
        ids: list[tuple[int, ...]] = []
        for label in self.task.labels:
            words = verbalize(label, self._prompting)
            label_ids = tokenize_label(backend, self._template_text, words)
            ids.append(label_ids)

        # The model scores labels by their tokens, so it could not tell these two apart.
        for number, label_ids in enumerate(ids):
            if label_ids in ids[:number]:
                raise ConfigError(
                    [
                        f"prompting.verbalizers: {self.task.labels[number]} has the tokens of "
                        "another label. Each label needs its own. Change its words."
                    ],
                    "prompting",
                )

        content_free = []
        if self._prompting.calibrate:
            for text in CONTENT_FREE_TEXTS:
                # the text also stands for the pair, which a template without {pair} ignores
                content_free.append(tuple(self._encode_prompt(Sample(text, text))))

        use_mean = self._prompting.normalize == "mean"
        return LabelWords(tuple(ids), tuple(content_free), use_mean)

    @property
    def _max_prompt_tokens(self) -> int:
        """Tokens of a prompt that leave room for the longest label."""
        return self.sequence_length - self.label_words().longest

    @override
    def _tokenize(self, samples: Sequence[Sample]) -> list[Any]:
        """Return the ids of each prompt; None where the prompt leaves no room for its text."""
        self._backend = self._backend or exact_backend(self.tokenizer)

        # No special tokens at the end: the words of a label continue the prompt.
        before = self._frame().before
        texts = [
            fill_template(self._template_text, sample.first, sample.second) for sample in samples
        ]
        with tokenizing_errors():
            encodings = self._backend.encode_batch(texts, add_special_tokens=False)
        prompts: list[list[int] | None] = [[*before, *encoding.ids] for encoding in encodings]

        max_tokens = self._max_prompt_tokens
        if self.data.overlong != "truncate":
            return prompts

        # Few prompts are too long: these alone are encoded again, one by one.
        for number, sample in enumerate(samples):
            ids = prompts[number]
            if ids is not None and len(ids) > max_tokens:
                prompts[number] = self._truncate_texts(sample, max_tokens)
        return prompts

    @override
    def _label(self, encoding: Any, sample: Sample, location: RowLocation) -> LabeledTokens:
        max_tokens = self._max_prompt_tokens
        if encoding is None or (self.data.overlong == "error" and len(encoding) > max_tokens):
            problem = "its prompt is too long even without any text of the row"
            if encoding is not None:
                problem = f"its prompt has {len(encoding)} tokens"

            raise location.error(
                f"{problem}. {max_tokens} are allowed "
                f"(batch.sequence_length={self.sequence_length} minus the longest label). Raise "
                "the length, show fewer examples, or set data.overlong=truncate."
            )

        if not encoding:
            raise location.error("gives no token. Text is needed. Remove the row.")

        labels = np.full(len(encoding), IGNORE_INDEX, np.int32)  # (T,)
        labels[:1] = sample.label
        if len(encoding) <= max_tokens:
            return LabeledTokens(encoding, labels)

        # overlong=drop: the index drops rows longer than a sequence and counts them. This prompt
        # may fit into one and only lack room for the label words, so it is lengthened.
        missing = self.sequence_length + 1 - len(encoding)
        ids = encoding + encoding[-1:] * missing
        padding = np.full(max(0, missing), IGNORE_INDEX, np.int32)
        return LabeledTokens(ids, np.concatenate([labels, padding]))

    def _encode_prompt(self, sample: Sample) -> list[int]:
        """Return the tokens of one prompt."""
        backend = exact_backend(self.tokenizer)
        before = self._frame().before
        text = fill_template(self._template_text, sample.first, sample.second)
        return [*before, *backend.encode(text, add_special_tokens=False).ids]

    def _truncate_texts(self, sample: Sample, max_tokens: int) -> list[int] | None:
        """Return the tokens of a prompt whose texts are truncated, the longer first, to fit."""
        texts = [sample.first, sample.second or ""]

        # Repeated, as the tokens of a shorter text may merge with the template in another way: the
        # excess is known only after encoding the whole prompt again.
        while True:
            ids = self._encode_prompt(Sample(*texts))
            excess = len(ids) - max_tokens
            if excess <= 0:
                return ids

            encodings = [self._backend.encode(text, add_special_tokens=False) for text in texts]
            longer = 0
            if len(encodings[1].ids) > len(encodings[0].ids):
                longer = 1

            offsets = encodings[longer].offsets
            if not offsets:
                return None

            # Cut after the last token that stays; at least one character is cut, to make progress.
            num_kept = max(0, len(offsets) - excess)
            end = 0
            if num_kept:
                end = offsets[num_kept - 1][1]

            text = texts[longer]
            texts[longer] = text[: min(end, len(text) - 1)]
