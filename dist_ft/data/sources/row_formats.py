"""What a row is: chat, instruction or text; and the checks each must pass.

Pure functions of one row. Every error names shard, row and column and says what to do. Does not tokenise and knows
nothing of chat templates but the messages they take.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from dist_ft.config.schema import DataSection
from dist_ft.core.errors import DataError
from dist_ft.core.logs import redact
from dist_ft.data.sources.discovery import Row, row_error


@dataclass(frozen=True)
class Rendered:
    """The text of a sample, and the [start, stop) character spans of it that are learned."""

    text: str
    spans: list[tuple[int, int]]


def decide(row: Row, data: DataSection, shard_url: str) -> str:
    """Return chat, instruction or text: `data.format`, or by the columns of a shard's first row."""
    if data.format != "auto":
        return data.format
    fields = data.fields
    if fields.messages in row:
        return "chat"
    if fields.prompt in row and fields.response in row:
        return "instruction"
    if fields.text in row:
        return "text"
    raise DataError(
        redact(
            f"data.format=auto: {shard_url} has the columns {', '.join(map(str, row)) or '(none)'}; needed are "
            f"'{fields.messages}' (chat), '{fields.prompt}' and '{fields.response}' (instruction) or '{fields.text}' "
            "(text); "
            "set data.fields.messages, .prompt, .response or .text to the names of your columns"
        )
    )


def messages(row: Row, data: DataSection, url: str, number: int) -> list[Row]:
    """Return the checked messages of a chat row: each {role, content} with text, at least one an answer."""
    column = data.fields.messages
    found = column_of(row, column, "data.fields.messages", url, number)
    if isinstance(found, str):
        found = _decoded(found, column, url, number)
    if not isinstance(found, list):
        raise row_error(
            url,
            number,
            f"{column} is a {type(found).__name__}; a list of {{role, content}} is needed; "
            "repair the row or set data.fields.messages",
        )
    if not found:
        raise row_error(
            url,
            number,
            f"{column}=[]: no message; a user and an assistant turn are needed; remove the row",
        )
    checked = [
        _message(item, f"{column}[{place}]", url, number) for place, item in enumerate(found)
    ]
    if data.targets == "response" and not any(item["role"] == "assistant" for item in checked):
        raise row_error(
            url,
            number,
            f"{column} has no assistant turn, so nothing to learn; at least one is needed; "
            "remove the row or set data.targets=all",
        )
    if data.system_prompt is not None and checked[0]["role"] != "system":
        checked.insert(0, {"role": "system", "content": data.system_prompt})
    return checked


def instruction_messages(row: Row, data: DataSection, url: str, number: int) -> list[Row]:
    """Return an instruction row as messages: [system], user, assistant."""
    system, prompt, response = _instruction(row, data, url, number)
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    return ([{"role": "system", "content": system}] if system else []) + turns


def instruction(row: Row, data: DataSection, url: str, number: int) -> Rendered:
    """Return an instruction row by `data.prompt_template`; the end-of-sequence token is added as an id later."""
    system, prompt, response = _instruction(row, data, url, number)
    if system and "{system}" not in data.prompt_template:
        raise DataError(
            f"data.prompt_template={data.prompt_template!r}: has no place for data.fields.system="
            f"{data.fields.system}; {{system}} is needed; add it, or unset data.fields.system"
        )
    try:
        start = data.prompt_template.format(prompt=prompt, system=system or "")
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        raise DataError(
            f"data.prompt_template={data.prompt_template!r}: is not a template ({type(error).__name__}: "
            f"{error}); {{prompt}} and {{system}} are allowed; write other braces twice"
        ) from error
    text = start + response
    return Rendered(text, [(0 if data.targets == "all" else len(start), len(text))])


def text(row: Row, data: DataSection, url: str, number: int) -> Rendered:
    """Return a text row, all of it learned."""
    content = text_of(
        column_of(row, data.fields.text, "data.fields.text", url, number),
        data.fields.text,
        url,
        number,
    )
    return Rendered(content, [(0, len(content))])


def _instruction(row: Row, data: DataSection, url: str, number: int) -> tuple[str | None, str, str]:
    fields = data.fields
    prompt, response = (
        text_of(column_of(row, column, f"data.fields.{name}", url, number), column, url, number)
        for name, column in (("prompt", fields.prompt), ("response", fields.response))
    )
    if not response.strip():
        raise row_error(
            url, number, f"{fields.response} is empty; an answer to learn is needed; remove the row"
        )
    if fields.system is None:
        return data.system_prompt, prompt, response
    system = column_of(row, fields.system, "data.fields.system", url, number)
    return (
        (data.system_prompt if system is None else text_of(system, fields.system, url, number)),
        prompt,
        response,
    )


def _message(item: Any, where: str, url: str, number: int) -> Row:
    if not isinstance(item, dict) or not isinstance(item.get("role"), str):
        raise row_error(
            url,
            number,
            f"{where} has no role; a {{role, content}} object is needed; repair the row",
        )
    calls = item.get("tool_calls")
    said = "" if calls and item.get("content") is None else item.get("content")
    content = text_of(said, f"{where}.content", url, number)
    if item["role"] == "assistant" and not content.strip() and not calls:
        raise row_error(
            url,
            number,
            f"{where}.content is empty; an assistant turn must say something; remove the row",
        )
    return {**{key: value for key, value in item.items() if value is not None}, "content": content}


def _decoded(text: str, column: str, url: str, number: int) -> Any:
    """Return messages that a table without nested columns (CSV) holds as JSON."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise row_error(
            url,
            number,
            f"{column} is text and not JSON ({error.msg}); a list of {{role, content}} is "
            "needed; repair the row or set data.fields.messages",
        ) from error


def column_of(row: Row, column: str, field: str, url: str, number: int) -> Any:
    """Return the value of a row's column, which the config's `field` names. Raises DataError if it has none."""
    if column not in row:
        raise row_error(
            url,
            number,
            f"has no column '{column}'; there are {', '.join(map(str, row)) or 'none'}; set "
            f"{field} to the right one or repair the row",
        )
    return row[column]


def text_of(value: Any, where: str, url: str, number: int) -> str:
    """Return a value that is text. Raises DataError for any other."""
    if not isinstance(value, str):
        raise row_error(
            url,
            number,
            f"{where} is a {type(value).__name__}; text is needed; convert it or remove the row",
        )
    return value
