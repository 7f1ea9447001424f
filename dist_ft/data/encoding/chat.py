"""Rows to tokens and targets, by the model's own template.

Guarantees: learned are the answers and what ends them, nothing else (unless `data.targets` is all): by the template's
own `{% generation %}` marks, or by comparing renderings of the conversation cut before and after each answer; a
template that allows neither is refused, never guessed. Tokenisation is one batched call. Does not cut or drop.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from itertools import chain
from types import MappingProxyType
from typing import Any

import numpy as np

from dist_ft.config.schema import DataSection
from dist_ft.core.errors import DataError, ModelError
from dist_ft.core.logs import redact
from dist_ft.data.encoding import pretokenized
from dist_ft.data.encoding.encoded import EncodedRows
from dist_ft.data.encoding.fast_tokenizer import exact_backend, tokenizer_name
from dist_ft.data.sources import row_formats
from dist_ft.data.sources.discovery import Row, row_error
from dist_ft.data.sources.row_formats import RenderedSample

CHUNK_ROWS = 1024
TEMPLATE_DATE = datetime(2024, 7, 26)
"""What templates that ask for today's date are told, on every day: tokens may not depend on when they are made. It is
the date that Llama's own templates take where they can not ask."""
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Encoder:
    """Turns rows into tokens as `data` says, with one tokenizer.

    Attributes:
        recipe: what decides the tokens besides tokenizer and data section; empty: nothing.
    """

    recipe: Mapping[str, Any] = MappingProxyType({})

    def __init__(self, tokenizer: Any, data: DataSection) -> None:
        """Assign only. `tokenizer` is a fast Hugging Face tokenizer; its `chat_template` may have been replaced."""
        self.tokenizer = tokenizer
        self.data = data
        self._backend: Any = None

    def encode(self, rows: Any, shard_url: str, first: int = 1) -> EncodedRows:
        """Return the tokens of `rows`; `shard_url` is how errors name where they come from.

        Args:
            rows: a list of rows, `DataError` standing for those that could not be decoded; or an Arrow table.
            shard_url: where they come from.
            first: number of the first row in its shard, from 1.

        Raises:
            DataError: a row that can not be used, unless data.bad_rows is skip; the text names shard and row.
            ModelError: a tokenizer that can not do what the format needs.
        """
        if pretokenized.is_pretokenized(rows, self.data.format):
            return pretokenized.encode(rows, len(self.tokenizer), shard_url, first)
        rows = rows if isinstance(rows, list) else rows.to_pylist()
        self._backend = self._backend or exact_backend(self.tokenizer)
        sound = next((row for row in rows if not isinstance(row, DataError)), None)
        kind = row_formats.detect_format(sound, self.data, shard_url) if sound is not None else ""
        bad: list[str] = []
        parts = [
            self._encode_chunk(
                rows[start : start + CHUNK_ROWS], kind, shard_url, start + first, bad
            )
            for start in range(0, len(rows), CHUNK_ROWS)
        ] or [(np.zeros(0, np.int32), np.zeros(0, np.uint8), np.zeros(0, np.int64))]
        ids, targets, lengths = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        return EncodedRows(ids, targets, offsets, kind, (len(rows),), tuple(bad))

    def shown(self, targets: np.ndarray) -> str:
        """Return, for a person, what a sample's targets (T,) say besides what can be marked in its text."""
        return ""

    def _encode_chunk(
        self, rows: Sequence[Row | DataError], kind: str, url: str, first: int, bad: list[str]
    ) -> tuple[np.ndarray, ...]:
        """Return tokens, targets and lengths of some rows, the first of which is number `first`; add to `bad`."""
        rendered = []
        for number, row in enumerate(rows, first):
            try:
                if isinstance(row, DataError):
                    raise row
                rendered.append(self._render(row, kind, url, number))
            except DataError as error:
                if self.data.bad_rows == "error":
                    raise
                bad.append(str(error))
                rendered.append(RenderedSample("", [(0, 0)]))
        if kind == "chat" or (kind == "instruction" and self._template is not None):
            return tokenize_samples(self._backend, rendered, [], [])
        before, after = self._frame()
        return tokenize_samples(self._backend, rendered, before, after)

    def _render(self, row: Row, kind: str, url: str, number: int) -> RenderedSample:
        """Return the text of a row and what of it is learned."""
        if kind == "text":
            return row_formats.render_text(row, self.data, url, number)
        if kind == "instruction" and self._template is None:
            return row_formats.render_instruction(row, self.data, url, number)
        if kind == "instruction":
            return self._chat(
                row_formats.read_instruction_messages(row, self.data, url, number), url, number
            )
        return self._chat(row_formats.read_messages(row, self.data, url, number), url, number)

    @property
    def _template(self) -> str | None:
        """The default chat template, or None."""
        template = self.tokenizer.chat_template
        if isinstance(template, dict):
            return template.get("default")
        return template

    def _frame(self) -> tuple[list[int], list[int]]:
        """Return the ids that go before and after a sample without a chat template: bos if usual, and eos."""
        plain = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        framed = self.tokenizer("a", add_special_tokens=True)["input_ids"]
        start = next((i for i in range(len(framed)) if framed[i : i + len(plain)] == plain), 0)
        eos = self.tokenizer.eos_token_id
        if eos is None:
            raise ModelError(
                f"model.tokenizer={tokenizer_name(self.tokenizer)}: has no end-of-sequence token; text and "
                "instruction samples end with one; set eos_token in its tokenizer_config.json"
            )
        return framed[:start], [eos]

    def _chat(self, messages: list[Row], url: str, number: int) -> RenderedSample:
        template = self._template
        if template is None:
            raise DataError(
                f"model.chat_template=none: {redact(url)} holds chats and the tokenizer has no chat "
                "template; chats need one; name a Jinja file in model.chat_template"
            )
        if self.data.targets == "all":
            whole = self._apply(messages, url, number)
            return RenderedSample(whole, [(0, len(whole))])
        if _GENERATION.search(template):
            return self._marked(messages, template, url, number)
        return self._by_prefix(messages, url, number)

    def _apply(self, messages: list[Row], url: str, number: int, generate: bool = False) -> str:
        """Render messages by the chat template."""
        from jinja2 import TemplateError

        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages,
                    chat_template=with_fixed_date(self._template or ""),
                    tokenize=False,
                    add_generation_prompt=generate,
                )
            )
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise self._refused(messages, error, url, number) from error

    def _marked(self, messages: list[Row], template: str, url: str, number: int) -> RenderedSample:
        """Render once; learned is what the template itself marks."""
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            rendered: Any = render_jinja_template(
                conversations=[messages],
                chat_template=with_fixed_date(template),
                return_assistant_tokens_mask=True,
                **self.tokenizer.special_tokens_map,
            )
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise self._refused(messages, error, url, number) from error
        (text,), (marks,) = rendered
        end = (
            self.tokenizer.eos_token or "\0"
        )  # a mark round the words alone leaves out what ends the turn
        return RenderedSample(
            text,
            [
                (start, stop + len(end) if text.startswith(end, stop) else stop)
                for start, stop in marks
            ],
        )

    def _by_prefix(self, messages: list[Row], url: str, number: int) -> RenderedSample:
        """Render whole, and cut before and after each answer; the cuts must be prefixes of the whole."""
        whole = self._apply(messages, url, number)
        spans = []
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            if not turn:
                raise row_error(
                    url,
                    number,
                    "starts with an assistant turn; a system or user turn must come before; "
                    "add one, remove the row, or set data.targets=all",
                )
            before = self._apply(messages[:turn], url, number, generate=True)
            last = turn == len(messages) - 1
            through = whole if last else self._apply(messages[: turn + 1], url, number).rstrip()
            if not (whole.startswith(through) and through.startswith(before)):
                raise row_error(
                    url,
                    number,
                    (
                        f"the chat template renders turn {turn + 1} otherwise once more turns follow, so it can not be "
                        "told which tokens answer; answers must lie between prefixes of the whole, or in {% generation "
                        "%} marks; add these marks (model.chat_template), or set data.targets=all"
                    ),
                )
            spans.append((len(before), len(through.rstrip())))
        return RenderedSample(whole, spans)

    @staticmethod
    def _refused(messages: list[Row], error: Exception, url: str, number: int) -> DataError:
        roles = ", ".join(str(message["role"]) for message in messages)
        return row_error(
            url,
            number,
            f"the chat template refuses messages with roles {roles} ({error}); allowed is "
            "what the template supports; change the rows, or name another template in "
            "model.chat_template",
        )


def with_fixed_date(template: str) -> str:
    """Return a template that renders as `template` does on `DATE`; that itself, used elsewhere, knows the true day."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    own = "{# on a fixed date #}\n" + template  # another text, so compiled and cached apart
    _compile_jinja_template(own).globals["strftime_now"] = TEMPLATE_DATE.strftime
    return own


def tokenize_samples(
    backend: Any, rendered: Sequence[RenderedSample], before: Sequence[int], after: Sequence[int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return tokens int32 (sum,), targets uint8 (sum,) and lengths int64 (n,) of samples, framed by ids.

    The ids `before` are not targets unless all is; those `after` end an answer and are. An empty text gives no token
    at all. `backend` is that of `exact_backend`.
    """
    texts = [sample.text for sample in rendered]
    partly = any(sample.spans != [(0, len(sample.text))] for sample in rendered)
    encode = (
        backend.encode_batch if partly else backend.encode_batch_fast
    )  # the fast one tells no ranges
    output = encode(texts, add_special_tokens=False)
    lengths = np.fromiter(map(len, output), np.int64, len(texts))
    total = int(lengths.sum())
    ids = np.fromiter(chain.from_iterable(one.ids for one in output), np.int32, total)
    learned = np.ones(total, dtype=np.uint8)
    if partly:
        flat = chain.from_iterable(chain.from_iterable(one.offsets for one in output))
        learned = mark_span_tokens(np.fromiter(flat, np.int64, 2 * total).reshape(-1, 2), lengths, rendered)
    framed = np.where(lengths > 0, lengths + len(before) + len(after), 0)
    starts = np.cumsum(framed) - framed
    places = np.repeat(starts + len(before) - (np.cumsum(lengths) - lengths), lengths) + np.arange(
        total
    )
    tokens = np.empty(int(framed.sum()), dtype=np.int32)
    targets = np.full(len(tokens), 0 if partly else 1, dtype=np.uint8)
    tokens[places], targets[places] = ids, learned
    full = lengths > 0
    for i, token in enumerate(before):
        tokens[starts[full] + i] = token
    for i, token in enumerate(after):
        place = (starts + framed - len(after) + i)[full]
        tokens[place], targets[place] = token, 1
    return tokens, targets, framed


def mark_span_tokens(offsets: np.ndarray, lengths: np.ndarray, rendered: Sequence[RenderedSample]) -> np.ndarray:
    """Return uint8 (sum,): 1 where a token shares a character with a learned span of its sample.

    `offsets` are the (sum, 2) character ranges of the tokens, each counted from the start of its own sample.
    """
    sizes = np.array([len(sample.text) + 1 for sample in rendered], dtype=np.int64)
    bases = np.cumsum(sizes) - sizes
    marks = np.zeros(int(sizes.sum()) + 1, dtype=np.int32)
    for base, sample in zip(bases.tolist(), rendered, strict=True):
        for start, stop in sample.spans:
            marks[base + start] += 1
            marks[base + stop] -= 1
    inside = np.concatenate([[0], np.cumsum(np.cumsum(marks) > 0)])
    begin, end = (offsets + np.repeat(bases, lengths)[:, None]).T
    return (inside[end] > inside[begin]).astype(np.uint8)
