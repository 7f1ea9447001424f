"""Text of others: no control character reaches a terminal, no markup reaches a report."""

from __future__ import annotations

import json
import logging
import unicodedata

import pytest

from dist_ft.core import logs, printable

HOSTILE = {
    "title": "\x1b]0;owned\x07",
    "clipboard": "\x1b]52;c;ZWNobyBoaQ==\x07",
    "color": "\x1b[31mred",
    "C1": "\x9b31mred",
    "carriage return": "ok\rfailed",
    "backspace": "rm\x08\x08ls",
    "NUL": "a\0b",
    "delete": "a\x7fb",
    "override": "a\u202egpj.exe",
    "isolate": "\u2066a\u2069",
    "mark": "\u200fa",
    "separator": "a\u2028b",
    "surrogate": "a\udcffb",
    "invisible": "a\U000e0041b",
}
HARMLESS = ("plain", "naïve café", "日本語", "עברית", "👩‍👩‍👧", "a\\b", "tab\tand\nnewline", "")


def is_harmless(char: str) -> bool:
    return char in "\n\t" or unicodedata.category(char) not in ("Cc", "Cs", "Zl", "Zp")


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_control_characters_are_escaped(text: str) -> None:
    for shown in (printable.printable(text), printable.printable_line(text)):
        assert all(map(is_harmless, shown))
        assert "\\" in shown
        shown.encode()  # a surrogate could not be written


@pytest.mark.parametrize("text", HARMLESS)
def test_other_text_is_unchanged(text: str) -> None:
    assert printable.printable(text) == text


def test_the_escape_says_which_character_it_was() -> None:
    assert printable.printable("\x1b[2J\u202e\U000e0041\n") == "\\x1b[2J\\u202e\\U000e0041\n"
    assert printable.printable_line("a\nb\tc\r") == "a\\nb\\tc\\x0d"


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_json_keeps_its_value(text: str) -> None:
    document = json.dumps({text: [text]}, ensure_ascii=False, indent=1)
    shown = printable.printable_json(document)

    assert json.loads(shown) == {text: [text]}
    assert all(map(is_harmless, shown))
    assert all(char not in shown for char in "\u202e\u2066\u200f\x9b")


def test_colors_of_other_programs_are_removed() -> None:
    assert printable.without_colors("\x1b[36m(worker)\x1b[0m step 1") == "(worker) step 1"


@pytest.mark.parametrize(
    "text",
    [
        "<script>alert(1)</script>",
        "![](http://evil/x.png)",
        "[click](javascript:alert(1))",
        "a | b",
        "`code`",
        "</td><img src=x onerror=alert(1)>",
        "&lt;script&gt;",
        "two\nlines",
        "\\<script>",
        "\\`",
    ],
)
def test_markdown_text_starts_nothing(text: str) -> None:
    import re

    shown = printable.markdown_text(text)

    assert "\n" not in shown
    # What is left of the characters that start something is escaped by an odd number of "\".
    for run, char in re.findall(r"(\\*)([`\[\]|<>])", shown):
        assert len(run) % 2 == 1, (shown, char)
    assert "&lt;script&gt;" not in shown or "<script>" in text


def test_a_cut_text_is_escaped_after_the_cut() -> None:
    assert printable.markdown_text("a" * 9 + "|b", max_chars=10) == "a" * 9 + "\\| ..."


@pytest.mark.parametrize("text", ["a", "`", "a``b", "```\n# title\n```", "", "a`"])
def test_code_is_longer_fenced_than_its_backticks(text: str) -> None:
    span = printable.markdown_code(text)
    fence = span[: len(span) - len(span.lstrip("`"))]
    assert span.endswith(fence) and fence not in text.replace("\n", "")

    first, content, last = printable.markdown_block(text, "yaml")
    assert first == f"{last}yaml"
    assert last not in content and set(last) == {"`"} and len(last) >= 3


def test_log_lines_are_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    logs.setup_logging()
    logging.getLogger("dist_ft.test").warning("row %s", "\x1b]0;owned\x07 \r gone")

    shown = capsys.readouterr().err
    assert "\\x1b]0;owned\\x07 \\x0d gone" in shown
    assert "\x1b" not in shown and "\r" not in shown


def test_tags_in_code_are_escaped_too() -> None:
    # Not every reader of a Markdown file knows that tags in a fenced block are not run.
    evil = "name: <script>alert(1)</script>"
    block = "\n".join(printable.markdown_block(evil, "yaml"))
    assert block == ('<pre lang="yaml">\nname: &lt;script&gt;alert(1)&lt;/script&gt;\n</pre>')
    assert printable.markdown_code("a<b>`") == "<code>a&lt;b&gt;`</code>"
    assert printable.markdown_code("a < b") == "`a < b`"


def test_long_lines_keep_their_start_and_their_advice():
    line = f"row 2: has no column 'label'. Its columns: {'a' * 70_000}. Rename a column."
    short = printable.shorten(line)
    assert len(short) < 1300 and short.startswith("row 2: has no column 'label'")
    assert f"({len(line):,} characters)" in short and short.endswith("Rename a column.")
    assert printable.shorten("short") == "short"
