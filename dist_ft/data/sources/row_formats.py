"""The formats of rows (chat, instruction, text) and the checks each row must pass.

Pure functions of one row. Every error names shard, row and column and says what to do. Rows are not
tokenized here; the only thing known about chat templates is the messages they take.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from dist_ft.config.schema import DataSection
from dist_ft.core.errors import DataError
from dist_ft.core.json_documents import decode_json
from dist_ft.core.logs import redact
from dist_ft.data.sources.discovery import Row, RowLocation


@dataclass(frozen=True)
class RenderedSample:
    """The text of a sample and which of it is trained on.

    Attributes:
        text: the whole text.
        spans: [start, stop) character spans of the targets.
    """

    text: str
    spans: list[tuple[int, int]]


class _Instruction(NamedTuple):
    """The texts of an instruction row; `system` is None without a system prompt."""

    system: str | None
    prompt: str
    response: str


def detect_format(row: Row, data: DataSection, shard_url: str) -> str:
    """Return chat, instruction or text: `data.format`, or by the columns of a shard's first row.

    Raises:
        DataError: no format has these columns.
    """
    if data.format != "auto":
        return data.format
    # Chat first: a chat row may also have a column named like one of the other formats.
    fields = data.fields
    if fields.messages in row:
        return "chat"
    if fields.prompt in row and fields.response in row:
        return "instruction"
    if fields.text in row:
        return "text"

    columns = ", ".join(map(str, row)) or "(none)"
    raise DataError(
        redact(
            f"data.format=auto: {shard_url} has the columns {columns}. It needs "
            f"'{fields.messages}' (chat), '{fields.prompt}' and '{fields.response}' (instruction) "
            f"or '{fields.text}' (text). Set data.fields.messages, .prompt, .response or .text to "
            "the names of your columns."
        )
    )


def read_messages(row: Row, data: DataSection, location: RowLocation) -> list[Row]:
    """Return the checked messages of a chat row: each is {role, content} with text.

    At least one message is an answer of the assistant, unless `data.targets` is all.
    """
    column = data.fields.messages
    messages = get_column(row, column, "data.fields.messages", location)
    if isinstance(messages, str):
        messages = _decode_json(messages, column, location)

    if not isinstance(messages, list):
        raise location.error(
            f"{column} is a {type(messages).__name__}. It must be a list of {{role, content}}. "
            "Repair the row or set data.fields.messages."
        )

    if not messages:
        raise location.error(
            f"{column}=[]: no message. A user and an assistant turn are needed. Remove the row."
        )

    checked = [
        _check_message(message, f"{column}[{index}]", location)
        for index, message in enumerate(messages)
    ]

    # with targets=all, a conversation without an answer is still trained on
    has_answer = any(message["role"] == "assistant" for message in checked)
    if data.targets == "response" and not has_answer:
        raise location.error(
            f"{column} has no assistant turn, so nothing to train on. At least one is needed. "
            "Remove the row or set data.targets=all."
        )

    # the row's own system prompt wins
    if data.system_prompt is not None and checked[0]["role"] != "system":
        checked.insert(0, {"role": "system", "content": data.system_prompt})
    return checked


def read_instruction_messages(row: Row, data: DataSection, location: RowLocation) -> list[Row]:
    """Return an instruction row as messages: [system], user, assistant."""
    texts = _read_instruction(row, data, location)
    messages = [
        {"role": "user", "content": texts.prompt},
        {"role": "assistant", "content": texts.response},
    ]
    if texts.system:
        messages.insert(0, {"role": "system", "content": texts.system})
    return messages


def render_instruction(row: Row, data: DataSection, location: RowLocation) -> RenderedSample:
    """Render an instruction row by `data.prompt_template`.

    The end-of-sequence token is added later, as an id.
    """
    texts = _read_instruction(row, data, location)
    # the column would otherwise be left out silently
    if texts.system and "{system}" not in data.prompt_template:
        raise DataError(
            f"data.prompt_template={data.prompt_template!r}: has no {{system}} for the column of "
            f"data.fields.system={data.fields.system}. Add {{system}}, or unset data.fields.system."
        )

    try:
        prompt = data.prompt_template.format(prompt=texts.prompt, system=texts.system or "")
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        raise DataError(
            f"data.prompt_template={data.prompt_template!r}: is not a valid template "
            f"({type(error).__name__}: {error}). It may use {{prompt}} and {{system}}. Write other "
            "braces twice."
        ) from error

    text = prompt + texts.response
    target_start = len(prompt)
    if data.targets == "all":
        target_start = 0
    return RenderedSample(text, [(target_start, len(text))])


def render_text(row: Row, data: DataSection, location: RowLocation) -> RenderedSample:
    """Render a text row; all of it is trained on."""
    column = data.fields.text
    value = get_column(row, column, "data.fields.text", location)
    text = require_text(value, column, location)
    return RenderedSample(text, [(0, len(text))])


def _read_instruction(row: Row, data: DataSection, location: RowLocation) -> _Instruction:
    """Return the checked texts of an instruction row."""
    fields = data.fields
    prompt = require_text(
        get_column(row, fields.prompt, "data.fields.prompt", location), fields.prompt, location
    )
    response = require_text(
        get_column(row, fields.response, "data.fields.response", location),
        fields.response,
        location,
    )
    if not response.strip():
        raise location.error(
            f"{fields.response} is empty. An answer to train on is needed. Remove the row."
        )

    system = data.system_prompt
    if fields.system is not None:
        value = get_column(row, fields.system, "data.fields.system", location)
        # null in one row: data.system_prompt stands in
        if value is not None:
            system = require_text(value, fields.system, location)

    return _Instruction(system, prompt, response)


def _check_message(message: Any, where: str, location: RowLocation) -> Row:
    """Return a message without its null fields, its content being text."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise location.error(
            f"{where} has no role. It must be a {{role, content}} object. Repair the row."
        )

    # APIs write null as the content of a turn that only calls tools
    tool_calls = message.get("tool_calls")
    value = message.get("content")
    if tool_calls and value is None:
        value = ""

    content = require_text(value, f"{where}.content", location)
    if message["role"] == "assistant" and not content.strip() and not tool_calls:
        raise location.error(
            f"{where}.content is empty. An assistant turn needs content. Remove the row."
        )

    # Arrow gives every message the keys of all: templates test whether a key exists, not its value.
    fields = {key: value for key, value in message.items() if value is not None}
    return {**fields, "content": content}


def _decode_json(text: str, column: str, location: RowLocation) -> Any:
    """Return messages that a table without nested columns (CSV) holds as JSON."""
    try:
        return decode_json(text)
    except ValueError as error:
        raise location.error(
            f"{column} is text and not JSON ({error}). It must be a list of {{role, content}}. "
            "Repair the row or set data.fields.messages."
        ) from error


def get_column(row: Row, column: str, field: str | None, location: RowLocation) -> Any:
    """Return the value of a row's column.

    `field` is the config field that names the column; None: no field does.

    Raises:
        DataError: the row has no such column.
    """
    if column not in row:
        remedy = "Rename a column"
        if field:
            remedy = f"Set {field} to the right one"

        raise location.error(
            f"has no column '{column}'. Its columns: {', '.join(map(str, row)) or 'none'}. "
            f"{remedy} or repair the row."
        )

    return row[column]


def require_text(value: Any, where: str, location: RowLocation) -> str:
    """Return a value that is text. Raises DataError for any other type."""
    if not isinstance(value, str):
        raise location.error(
            f"{where} is a {type(value).__name__}. It must be text. Convert it or remove the row."
        )

    return value
