"""Row formats: how a row is read, and every way it can be wrong."""

import pytest
from unit.data.data_helpers import chat, data_section

from dist_ft.core.errors import DataError
from dist_ft.data.sources import row_formats
from dist_ft.data.sources.discovery import RowLocation

CHAT = chat("hi", "hello")
PAIR = {"prompt": "1+1?", "response": "2"}


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        (CHAT, "chat"),
        (PAIR, "instruction"),
        ({"text": "x"}, "text"),
        ({**CHAT, "prompt": "a", "response": "b"}, "chat"),
    ],
)
def test_auto_format_is_detected_by_columns(row, kind):
    assert row_formats.detect_format(row, data_section(), "s") == kind


def test_configured_format_and_fields_are_used():
    assert row_formats.detect_format({"x": 1}, data_section(format="text"), "s") == "text"
    fields = {"prompt": "q", "response": "a"}
    assert (
        row_formats.detect_format({"q": "", "a": ""}, data_section(fields=fields), "s")
        == "instruction"
    )


def test_unknown_columns_are_refused():
    with pytest.raises(
        DataError,
        match=(
            r"data.format=auto: s3://b/x.jsonl has the columns question, answer. It needs 'messages' \(chat\), 'prompt' "
            r"and 'response' \(instruction\) or 'text' \(text\). Set data.fields.messages, .prompt, .response or .text"
        ),
    ):
        row_formats.detect_format({"question": "", "answer": ""}, data_section(), "s3://b/x.jsonl")


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"text": "x"}, "has no column 'messages'. Its columns: text. Set data.fields.messages"),
        (
            {"messages": "hi"},
            r"messages is text and not JSON \(Expecting value at column 1\). It must be a list of \{role, content\}",
        ),
        (
            {"messages": []},
            r"messages=\[\]: no message. A user and an assistant turn are needed. Remove the row",
        ),
        ({"messages": [{"from": "human", "value": "x"}]}, r"messages\[0\] has no role"),
        ({"messages": ["x"]}, r"messages\[0\] has no role"),
        (
            {"messages": [{"role": "user", "content": None}]},
            r"messages\[0\].content is a NoneType. It must be text",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            r"messages\[0\].content is a list. It must be text",
        ),
        (
            chat("hi"),
            "messages has no assistant turn, so nothing to train on. .* or set data.targets=all",
        ),
        (
            chat("hi", " "),
            r"messages\[1\].content is empty. An assistant turn needs content. Remove the row",
        ),
    ],
)
def test_bad_chat_rows_are_refused(row, problem):
    with pytest.raises(DataError, match=f"^shard row 3: {problem}"):
        row_formats.read_messages(row, data_section(), RowLocation("shard", 3))


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (
            {"prompt": "x"},
            "has no column 'response'. Its columns: prompt. Set data.fields.response",
        ),
        ({"prompt": 3, "response": "x"}, "prompt is a int. It must be text"),
        (
            {"prompt": "x", "response": ""},
            "response is empty. An answer to train on is needed. Remove the row",
        ),
    ],
)
def test_bad_instruction_rows_are_refused(row, problem):
    with pytest.raises(DataError, match=f"^shard row 3: {problem}"):
        row_formats.render_instruction(row, data_section(), RowLocation("shard", 3))


def test_bad_text_row_is_refused():
    with pytest.raises(DataError, match=r"^shard row 1: text is a NoneType. It must be text"):
        row_formats.render_text({"text": None}, data_section(), RowLocation("shard", 1))


def test_all_targets_need_no_answer():
    assert (
        row_formats.read_messages(chat("hi"), data_section(targets="all"), RowLocation("s", 1))
        == chat("hi")["messages"]
    )


def test_null_fields_of_a_message_are_dropped():
    row = {
        "messages": [
            {"role": "user", "content": "a", "name": None},
            {"role": "assistant", "content": "b"},
        ]
    }
    assert row_formats.read_messages(row, data_section(), RowLocation("s", 1))[0] == {
        "role": "user",
        "content": "a",
    }


def test_instruction_is_rendered_by_prompt_template():
    found = row_formats.render_instruction(
        PAIR, data_section(prompt_template="Q: {prompt}\nA: "), RowLocation("s", 1)
    )
    assert found.text == "Q: 1+1?\nA: 2" and found.spans == [(11, 12)]
    whole = row_formats.render_instruction(PAIR, data_section(targets="all"), RowLocation("s", 1))
    assert whole.spans == [(0, len(whole.text))]
    braces = row_formats.render_instruction(
        {"prompt": "{x}", "response": "{y}"}, data_section(), RowLocation("s", 1)
    )
    assert braces.text == "{x}\n{y}"


def test_system_column_of_instruction_is_used():
    row = {**PAIR, "system": "Be brief."}
    fields = {"system": "system"}
    assert [
        turn["role"]
        for turn in row_formats.read_instruction_messages(
            row, data_section(fields=fields), RowLocation("s", 1)
        )
    ] == ["system", "user", "assistant"]
    with_system = data_section(fields=fields, prompt_template="{system} {prompt} ")
    assert (
        row_formats.render_instruction(row, with_system, RowLocation("s", 1)).text
        == "Be brief. 1+1? 2"
    )
    with pytest.raises(
        DataError,
        match=r"data.prompt_template=.*: has no {system} for the column of data.fields.system=system",
    ):
        row_formats.render_instruction(row, data_section(fields=fields), RowLocation("s", 1))


@pytest.mark.parametrize("template", ["{question}", "{", "{0}"])
def test_bad_prompt_template_is_refused(template):
    with pytest.raises(
        DataError,
        match=r"data.prompt_template=.*: is not a valid template .*Write other braces twice",
    ):
        row_formats.render_instruction(
            PAIR, data_section(prompt_template=template), RowLocation("s", 1)
        )


def test_default_system_prompt_is_for_rows_without_one():
    data = data_section(system_prompt="be brief")
    assert row_formats.read_messages(chat("a", "b"), data, RowLocation("s", 1))[0] == {
        "role": "system",
        "content": "be brief",
    }
    assert (
        row_formats.read_messages(chat("a", "b", system="own"), data, RowLocation("s", 1))[0][
            "content"
        ]
        == "own"
    )
    pair = {"prompt": "a", "response": "b"}
    assert row_formats.read_instruction_messages(pair, data, RowLocation("s", 1))[0] == {
        "role": "system",
        "content": "be brief",
    }


def test_tool_calls_need_no_content():
    row = {
        "messages": [
            {"role": "user", "content": "2+2?"},
            {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add"}}]},
            {"role": "tool", "content": "4"},
            {"role": "assistant", "content": "4"},
        ]
    }
    found = row_formats.read_messages(row, data_section(), RowLocation("s", 1))
    assert found[1]["content"] == "" and found[1]["tool_calls"] and found[2]["role"] == "tool"


def test_messages_can_be_json_text():
    row = {"messages": '[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]'}
    assert len(row_formats.read_messages(row, data_section(), RowLocation("s", 1))) == 2
