"""Encode rows as tokens and targets, by the model's own chat template.

Guarantees: the targets are the answers and the tokens that end them, nothing else (unless
`data.targets` is all). They come from the template's own `{% generation %}` marks, or from
comparing renderings of the conversation cut before and after each answer. A template that allows
neither is refused, never guessed. Rows are tokenized in batched calls. Rows are not truncated or
dropped here.

T is the number of tokens of a sample.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from dist_ft.config.schema import DataSection
from dist_ft.core.errors import DataError, ModelError
from dist_ft.core.logs import redact
from dist_ft.data.encoding import pretokenized
from dist_ft.data.encoding.encoded import EncodedRows
from dist_ft.data.encoding.fast_tokenizer import exact_backend, tokenizer_name
from dist_ft.data.encoding.sample_tokens import TokenizedSamples, tokenize_samples
from dist_ft.data.sources import row_formats
from dist_ft.data.sources.discovery import Row, RowLocation
from dist_ft.data.sources.row_formats import RenderedSample
from dist_ft.pretrained import chat_templates, tokenizing
from dist_ft.pretrained.tokenizing import UntokenizableError

CHUNK_ROWS = 1024
"""Rows tokenized in one call."""
TEMPLATE_DATE = datetime(2024, 7, 26)
"""The date that templates get from `strftime_now`, whatever the day.

Tokens must not depend on when they are created. It is the default of Llama's own templates when
they have no such function.
"""
MAX_ROLES = 8
"""Roles that an error lists."""
_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


class _Frame(NamedTuple):
    """The ids that go before and after a sample without a chat template."""

    before: list[int]
    after: list[int]


class Encoder:
    """Encodes rows as tokens as the data section says, with one tokenizer.

    Attributes:
        recipe: what decides the tokens in addition to tokenizer and data section; empty for
            nothing.
    """

    recipe: Mapping[str, Any] = MappingProxyType({})

    def __init__(self, tokenizer: Any, data: DataSection) -> None:
        """Assign only; `tokenizer` is a fast Hugging Face one, perhaps with a custom template."""
        self.tokenizer = tokenizer
        self.data = data
        self._backend: Any = None

    def encode(self, rows: Any, shard_url: str, first: int = 1) -> EncodedRows:
        """Return the tokens of `rows`.

        Args:
            rows: a list of rows, with a `DataError` in place of each row that could not be decoded;
                or an Arrow table.
            shard_url: the shard of the rows; errors name it.
            first: number of the first row in its shard, from 1.

        Raises:
            DataError: a row that cannot be used, unless data.bad_rows is skip; the text names shard
                and row.
            ModelError: a tokenizer that lacks what the format needs.
        """
        if pretokenized.is_pretokenized(rows, self.data.format):
            return pretokenized.encode(rows, len(self.tokenizer), shard_url, first)
        if not isinstance(rows, list):
            rows = rows.to_pylist()
        self._backend = self._backend or exact_backend(self.tokenizer)

        # The first row decides the format of the shard's rows: a row without its columns is then an
        # error and not silently read as another format.
        first_decoded = next((row for row in rows if not isinstance(row, DataError)), None)
        format = ""
        if first_decoded is not None:
            format = row_formats.detect_format(first_decoded, self.data, shard_url)

        # In chunks, as the encodings of a whole block would take many times its memory.
        bad_rows: list[str] = []
        chunks = []
        for start in range(0, len(rows), CHUNK_ROWS):
            chunk = rows[start : start + CHUNK_ROWS]
            chunks.append(self._encode_chunk(chunk, format, shard_url, start + first, bad_rows))

        if not chunks:
            chunks = [
                TokenizedSamples(
                    np.zeros(0, np.int32), np.zeros(0, np.uint8), np.zeros(0, np.int64)
                )
            ]

        tokens, targets, lengths = (
            np.concatenate(columns) for columns in zip(*chunks, strict=True)
        )
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        return EncodedRows(tokens, targets, offsets, format, (len(rows),), tuple(bad_rows))

    def describe_targets(self, targets: np.ndarray) -> str:
        """Return for people what a sample's targets (T,) say that marks in its text cannot."""
        return ""

    def _encode_chunk(
        self,
        rows: Sequence[Row | DataError],
        format: str,
        url: str,
        first: int,
        bad_rows: list[str],
    ) -> TokenizedSamples:
        """Tokenize rows; the first has the number `first`; problems are added to `bad_rows`."""
        samples = []
        for number, row in enumerate(rows, first):
            try:
                if isinstance(row, DataError):
                    raise row
                samples.append(self._render(row, format, RowLocation(url, number)))
            except DataError as error:
                if self.data.bad_rows == "error":
                    raise
                bad_rows.append(str(error))
                # an empty sample keeps the numbers of the later rows
                samples.append(RenderedSample("", [(0, 0)]))

        # a chat template writes its own special tokens
        frame = _Frame([], [])
        has_template = self._template is not None
        if format != "chat" and not (format == "instruction" and has_template):
            frame = self._frame()

        try:
            return tokenize_samples(self._backend, samples, frame.before, frame.after)
        except UntokenizableError:
            self._remove_untokenizable(samples, RowLocation(url, first), bad_rows)
        return tokenize_samples(self._backend, samples, frame.before, frame.after)

    def _remove_untokenizable(
        self, samples: list[RenderedSample], location: RowLocation, bad_rows: list[str]
    ) -> None:
        """Empty the samples that the tokenizer cannot take; `location` is that of the first.

        Raises:
            DataError: there is one, and data.bad_rows is error.
        """
        for number, sample in enumerate(samples):
            try:
                tokenize_samples(self._backend, [sample], [], [])
            except UntokenizableError as cause:
                row = RowLocation(location.shard_url, location.number + number)
                error = row.error(f"{tokenizing.describe(cause)}, or set data.bad_rows=skip.")
                if self.data.bad_rows == "error":
                    raise error from cause
                bad_rows.append(str(error))
                samples[number] = RenderedSample("", [(0, 0)])

    def _render(self, row: Row, format: str, location: RowLocation) -> RenderedSample:
        """Return the text of a row and which of it is trained on."""
        if format == "text":
            return row_formats.render_text(row, self.data, location)
        if format == "instruction":
            if self._template is None:
                return row_formats.render_instruction(row, self.data, location)
            messages = row_formats.read_instruction_messages(row, self.data, location)
        else:
            messages = row_formats.read_messages(row, self.data, location)

        return self._render_chat(messages, location)

    @property
    def _template(self) -> str | None:
        """The default chat template, or None."""
        template = self.tokenizer.chat_template
        if isinstance(template, dict):
            return template.get("default")
        return template

    def _frame(self) -> _Frame:
        """Return the ids around a sample without a chat template.

        Before it are the special tokens that the tokenizer adds (bos), after it is eos.
        """
        # What precedes a text is seen only by tokenizing one with and without special tokens.
        plain = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        framed = self.tokenizer("a", add_special_tokens=True)["input_ids"]
        start = next((i for i in range(len(framed)) if framed[i : i + len(plain)] == plain), 0)
        eos = self.tokenizer.eos_token_id
        if eos is None:
            raise ModelError(
                f"model.tokenizer={tokenizer_name(self.tokenizer)}: has no end-of-sequence token. "
                "Text and instruction samples end with one. Set eos_token in its "
                "tokenizer_config.json."
            )

        return _Frame(framed[:start], [eos])

    def _render_chat(self, messages: list[Row], location: RowLocation) -> RenderedSample:
        """Render a conversation."""
        template = self._template
        if template is None:
            raise DataError(
                f"model.chat_template=none: {redact(location.shard_url)} holds chats and the "
                "tokenizer has no chat template. Chats need one. Name a Jinja file in "
                "model.chat_template."
            )

        if self.data.targets == "all":
            whole = self._apply_template(messages, location)
            return RenderedSample(whole, [(0, len(whole))])
        if _GENERATION_MARK.search(template):
            return self._render_with_marks(messages, template, location)
        return self._render_by_prefixes(messages, location)

    def _apply_template(
        self, messages: list[Row], location: RowLocation, add_generation_prompt: bool = False
    ) -> str:
        """Render messages by the chat template."""
        try:
            dated = with_fixed_date(self._template or "")
            return chat_templates.render(self.tokenizer, messages, dated, add_generation_prompt)
        except chat_templates.TemplateError as error:
            raise _template_error(messages, error, location) from error

    def _render_with_marks(
        self, messages: list[Row], template: str, location: RowLocation
    ) -> RenderedSample:
        """Render once; the targets are what the template itself marks."""
        try:
            dated = with_fixed_date(template)
            text, marks = chat_templates.render_with_marks(self.tokenizer, messages, dated)
        except chat_templates.TemplateError as error:
            raise _template_error(messages, error, location) from error

        # A mark around the words alone excludes the token that ends the turn: add it.
        end_token = self.tokenizer.eos_token or "\0"
        spans = []
        for start, stop in marks:
            if text.startswith(end_token, stop):
                stop += len(end_token)
            spans.append((start, stop))

        return RenderedSample(text, spans)

    def _render_by_prefixes(self, messages: list[Row], location: RowLocation) -> RenderedSample:
        """Render the whole, and up to before and after each answer: all prefixes of the whole."""
        whole = self._apply_template(messages, location)
        spans = []
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            if not turn:
                raise location.error(
                    "starts with an assistant turn. A system or user turn must come first. "
                    "Add one, remove the row, or set data.targets=all."
                )

            # The answer starts where `before` ends and ends with `through`. A line break that the
            # template adds after a turn is not part of the answer.
            before = self._apply_template(messages[:turn], location, add_generation_prompt=True)
            through = whole
            if turn < len(messages) - 1:
                through = self._apply_template(messages[: turn + 1], location).rstrip()
            if not (whole.startswith(through) and through.startswith(before)):
                raise location.error(
                    f"the chat template renders turn {turn + 1} differently when more turns "
                    "follow, so the tokens of the answer are unknown. Answers must lie between "
                    "prefixes of the whole, or in {% generation %} marks. Add these marks "
                    "(model.chat_template), or set data.targets=all."
                )

            spans.append((len(before), len(through.rstrip())))

        return RenderedSample(whole, spans)


def _template_error(messages: list[Row], error: Exception, location: RowLocation) -> DataError:
    """Return the error for messages that the chat template refuses."""
    roles = ", ".join(str(message["role"]) for message in messages[:MAX_ROLES])
    if len(messages) > MAX_ROLES:
        roles += ", ..."
    return location.error(
        f"the chat template refuses messages with roles {roles} ({error}). Only what the template "
        "supports is allowed. Change the rows, or name another template in model.chat_template."
    )


def with_fixed_date(template: str) -> str:
    """Return a template that renders as `template` does on `TEMPLATE_DATE`.

    `template` itself, used elsewhere, still gets the true date.

    Raises:
        chat_templates.TemplateError: it cannot be compiled.
    """
    # The comment makes it another text, so that the library compiles and caches it separately.
    dated = "{# on a fixed date #}\n" + template
    chat_templates.compile_template(dated).globals["strftime_now"] = TEMPLATE_DATE.strftime
    return dated
