"""Resolving escapes keeps track of where each part was."""

from __future__ import annotations

import pytest

from dist_ft.core.escapes import join_lines, resolve_escapes


@pytest.mark.parametrize(
    ("text", "resolved"),
    [
        ("a%20b", "a b"),
        ("%C3%A9%c3%a9", "éé"),
        ("a\\nb\\tc", "a\nb\tc"),
        ("\\u0061\\x62\\143\\U00000064", "abcd"),
        ("\\xc3\\xa9", "é"),
        ("\\xe9", "é"),
        ("\\303\\251\\ud83d\\udd11", "é\U0001f511"),
        ("&lt;&#65;&#x42;&quot;", '<AB"'),
        ("\\\"\\\\\\/\\'", "\"\\/'"),
        ("50 % of 3", None),
        ("plain", None),
    ],
)
def test_escapes(text, resolved):
    layers = resolve_escapes(text)
    assert (layers[0].text if layers else None) == resolved


def test_escapes_within_escapes():
    assert [layer.text for layer in resolve_escapes("%255Cn|")] == ["%5Cn|", "\\n|", "\n|"]


def test_a_part_of_the_text_is_found_in_the_original():
    text = "x=%22a%5Cu0062c%22;"
    layer = resolve_escapes(text)[1]
    start = layer.text.index("abc")
    first, last = layer.original(start, start + 3)
    # Whole escapes: the quote and the backslash next to it are escapes of their own.
    assert text[first:last] == "a%5Cu0062c"


def test_line_breaks_within_a_word():
    for text in ("ab\ncd", "ab\r\n   cd", "│ ab │\n│ cd │", "ab=\ncd", "ab\\\n  cd"):
        joined, spaced = join_lines(text, None)
        assert "abcd" in joined.text and "ab cd" in spaced.text
        first, last = joined.original(joined.text.index("abcd"), joined.text.index("abcd") + 4)
        assert text[first:last].startswith("ab") and text[first:last].endswith("cd")
    assert not join_lines("one line", None)
