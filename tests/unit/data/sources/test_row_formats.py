"""Formats: how a row is understood, and every way it can be wrong."""

import pytest
from unit.data.data_helpers import chat, data_section

from dist_ft.core.errors import DataError
from dist_ft.data.sources import row_formats

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
def test_auto_goes_by_columns(row, kind):
    assert row_formats.decide(row, data_section(), "s") == kind


def test_named_format_and_fields():
    assert row_formats.decide({"x": 1}, data_section(format="text"), "s") == "text"
    fields = {"prompt": "q", "response": "a"}
    assert row_formats.decide({"q": "", "a": ""}, data_section(fields=fields), "s") == "instruction"


def test_unknown_columns():
    with pytest.raises(
        DataError,
        match=(
            r"data.format=auto: s3://b/x.jsonl has the columns question, answer; needed are 'messages' \(chat\), 'prompt' "
            r"and 'response' \(instruction\) or 'text' \(text\); set data.fields.messages, .prompt, .response or .text"
        ),
    ):
        row_formats.decide({"question": "", "answer": ""}, data_section(), "s3://b/x.jsonl")


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"text": "x"}, "has no column 'messages'; there are text; set data.fields.messages"),
        (
            {"messages": "hi"},
            r"messages is text and not JSON \(Expecting value\); a list of \{role, content\} is needed",
        ),
        (
            {"messages": []},
            r"messages=\[\]: no message; a user and an assistant turn are needed; remove the row",
        ),
        ({"messages": [{"from": "human", "value": "x"}]}, r"messages\[0\] has no role"),
        ({"messages": ["x"]}, r"messages\[0\] has no role"),
        (
            {"messages": [{"role": "user", "content": None}]},
            r"messages\[0\].content is a NoneType; text is needed",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            r"messages\[0\].content is a list; text",
        ),
        (
            chat("hi"),
            "messages has no assistant turn, so nothing to learn; .* or set data.targets=all",
        ),
        (
            chat("hi", " "),
            r"messages\[1\].content is empty; an assistant turn must say something; remove the row",
        ),
    ],
)
def test_bad_chat_rows(row, what):
    with pytest.raises(DataError, match=f"^shard row 3: {what}"):
        row_formats.messages(row, data_section(), "shard", 3)


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"prompt": "x"}, "has no column 'response'; there are prompt; set data.fields.response"),
        ({"prompt": 3, "response": "x"}, "prompt is a int; text is needed"),
        (
            {"prompt": "x", "response": ""},
            "response is empty; an answer to learn is needed; remove the row",
        ),
    ],
)
def test_bad_instruction_rows(row, what):
    with pytest.raises(DataError, match=f"^shard row 3: {what}"):
        row_formats.instruction(row, data_section(), "shard", 3)


def test_bad_text_row():
    with pytest.raises(DataError, match=r"^shard row 1: text is a NoneType; text is needed"):
        row_formats.text({"text": None}, data_section(), "shard", 1)


def test_all_targets_need_no_answer():
    assert (
        row_formats.messages(chat("hi"), data_section(targets="all"), "s", 1)
        == chat("hi")["messages"]
    )


def test_absent_values_of_a_message_are_dropped():
    row = {
        "messages": [
            {"role": "user", "content": "a", "name": None},
            {"role": "assistant", "content": "b"},
        ]
    }
    assert row_formats.messages(row, data_section(), "s", 1)[0] == {"role": "user", "content": "a"}


def test_instruction_by_template():
    found = row_formats.instruction(PAIR, data_section(prompt_template="Q: {prompt}\nA: "), "s", 1)
    assert found.text == "Q: 1+1?\nA: 2" and found.spans == [(11, 12)]
    whole = row_formats.instruction(PAIR, data_section(targets="all"), "s", 1)
    assert whole.spans == [(0, len(whole.text))]
    braces = row_formats.instruction({"prompt": "{x}", "response": "{y}"}, data_section(), "s", 1)
    assert braces.text == "{x}\n{y}"


def test_instruction_with_system():
    row = {**PAIR, "system": "Be brief."}
    fields = {"system": "system"}
    assert [
        turn["role"]
        for turn in row_formats.instruction_messages(row, data_section(fields=fields), "s", 1)
    ] == ["system", "user", "assistant"]
    with_system = data_section(fields=fields, prompt_template="{system} {prompt} ")
    assert row_formats.instruction(row, with_system, "s", 1).text == "Be brief. 1+1? 2"
    with pytest.raises(
        DataError, match=r"data.prompt_template=.*: has no place for data.fields.system=system"
    ):
        row_formats.instruction(row, data_section(fields=fields), "s", 1)


@pytest.mark.parametrize("template", ["{question}", "{", "{0}"])
def test_bad_prompt_template(template):
    with pytest.raises(
        DataError, match=r"data.prompt_template=.*: is not a template .*write other braces twice"
    ):
        row_formats.instruction(PAIR, data_section(prompt_template=template), "s", 1)


def test_a_system_prompt_for_rows_that_bring_none():
    data = data_section(system_prompt="be brief")
    assert row_formats.messages(chat("a", "b"), data, "s", 1)[0] == {
        "role": "system",
        "content": "be brief",
    }
    assert row_formats.messages(chat("a", "b", system="own"), data, "s", 1)[0]["content"] == "own"
    pair = {"prompt": "a", "response": "b"}
    assert row_formats.instruction_messages(pair, data, "s", 1)[0] == {
        "role": "system",
        "content": "be brief",
    }


def test_tool_calls_need_no_words():
    row = {
        "messages": [
            {"role": "user", "content": "2+2?"},
            {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add"}}]},
            {"role": "tool", "content": "4"},
            {"role": "assistant", "content": "4"},
        ]
    }
    found = row_formats.messages(row, data_section(), "s", 1)
    assert found[1]["content"] == "" and found[1]["tool_calls"] and found[2]["role"] == "tool"


def test_messages_of_a_table_without_nested_columns():
    row = {"messages": '[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]'}
    assert len(row_formats.messages(row, data_section(), "s", 1)) == 2
