"""Makes text that is not ours harmless where people read it: terminals, Markdown, HTML, JSON.

Names of files, rows of data, labels, generated text, manifests and errors of templates come from
others. A terminal would execute escape sequences in them (set its title, fill the clipboard,
overwrite lines), and bidirectional overrides show text in another order than it is read. Pure.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Mapping

# A replacement table for `str.translate`, which is fast and leaves all other text as it is.
MAX_LINE_CHARS = 1200
"""Characters of a line of a message: a value that is quoted in it may have millions."""
_KEPT = "\n\t"
"""Control characters that stay: they are layout, and cannot move the cursor back."""
_RANGES = (
    (0x00, 0x1F),  # C0: escape, carriage return, backspace, bell, NUL, ...
    (0x7F, 0x9F),  # delete, and C1: 0x9b starts a sequence as escape and "[" do
    (0x061C, 0x061C),  # Arabic letter mark
    (0x200E, 0x200F),  # marks of direction
    (0x2028, 0x2029),  # line and paragraph separators
    (0x202A, 0x202E),  # embeddings and overrides of direction
    (0x2066, 0x2069),  # isolates of direction
    (0xFFF9, 0xFFFB),  # interlinear annotation, which hides text
    (0xD800, 0xDFFF),  # surrogates, which no encoding can write
    (0xE0000, 0xE007F),  # invisible copies of ASCII
)


def _escape(code: int) -> str:
    """Return the escape of a character, as Python writes it."""
    if code <= 0xFF:
        return f"\\x{code:02x}"
    if code <= 0xFFFF:
        return f"\\u{code:04x}"
    return f"\\U{code:08x}"


def _json_escape(code: int) -> str:
    """Return the escape of a character within a JSON string."""
    if code <= 0xFFFF:
        return f"\\u{code:04x}"

    # JSON writes characters beyond the first 65,536 as two surrogates.
    offset = code - 0x10000
    return f"\\u{0xD800 + (offset >> 10):04x}\\u{0xDC00 + (offset & 0x3FF):04x}"


def _table(escape: Callable[[int], str], kept: str) -> dict[int, str]:
    table: dict[int, str] = {}
    for first, last in _RANGES:
        for code in range(first, last + 1):
            if chr(code) not in kept:
                table[code] = escape(code)
    return table


_TEXT: Mapping[int, str] = _table(_escape, _KEPT)
_LINE: Mapping[int, str] = _table(_escape, "") | {ord("\n"): "\\n", ord("\t"): "\\t"}
_JSON: Mapping[int, str] = _table(_json_escape, _KEPT)

# Most text has none of them, and a search is faster than a translation.
_ANY = re.compile("[" + "".join(f"{chr(first)}-{chr(last)}" for first, last in _RANGES) + "]")
_TAG = re.compile(r"<[A-Za-z/!?]")
_COLOR = re.compile(r"\x1b\[[0-9;:]*m")

_MARKDOWN = str.maketrans(
    {
        "\\": "\\\\",
        "`": "\\`",
        "[": "\\[",
        "]": "\\]",
        "|": "\\|",
        "&": "&amp;",
        "<": "&lt;",
        ">": "&gt;",
    }
)
"""Characters that start code, links, images, cells, entities or HTML."""


def printable(text: str) -> str:
    """Return `text` with control characters escaped (`\\x1b`); newlines and tabs stay."""
    if _ANY.search(text) is None:
        return text
    return text.translate(_TEXT)


def printable_line(text: str) -> str:
    """Return `text` as one line: as `printable`, with newlines and tabs escaped as well."""
    if _ANY.search(text) is None:
        return text
    return text.translate(_LINE)


def shorten(text: str, max_chars: int = MAX_LINE_CHARS) -> str:
    """Return `text`; of a longer one its start and its end, where a message says what to do.

    Credentials must be redacted before: half of one would not be recognized any more.
    """
    if len(text) <= max_chars:
        return text

    half = max_chars // 2
    return f"{text[:half]} ... ({len(text):,} characters) ... {text[-half:]}"


def printable_json(text: str) -> str:
    """Return JSON text with control characters escaped as JSON does: it stays the same value."""
    if _ANY.search(text) is None:
        return text
    return text.translate(_JSON)


def without_colors(text: str) -> str:
    """Return `text` without sequences that set a color or style; for logs of other programs."""
    return _COLOR.sub("", text)


def markdown_text(text: str, max_chars: int = 0) -> str:
    """Return `text` as text of a Markdown line or cell: no code, link, image or HTML starts in it.

    Args:
        text: any text; its white space becomes single spaces.
        max_chars: longer texts are cut; 0: never.
    """
    line = printable_line(" ".join(text.split()))

    # Before the escapes, which must not be cut in half.
    end = ""
    if max_chars and len(line) > max_chars:
        line, end = line[:max_chars], " ..."
    return line.translate(_MARKDOWN) + end


def markdown_code(text: str) -> str:
    """Return `text` as a Markdown code span, whatever backticks it has."""
    line = printable_line(text)
    if _TAG.search(line):
        return f"<code>{html.escape(line, quote=False)}</code>"
    fence = "`" * (_longest_backticks(line) + 1)

    # Spaces keep a backtick at an end apart from the fence. Markdown removes them.
    padding = " " if "`" in line or not line else ""
    return f"{fence}{padding}{line}{padding}{fence}"


def markdown_block(text: str, language: str = "") -> list[str]:
    """Return the lines of a Markdown code block with `text`, whatever backticks and tags it has."""
    content = printable(text.rstrip())
    # Markdown shows tags in a fenced block as they are, but not every reader of a file is Markdown.
    if _TAG.search(content):
        return [f'<pre lang="{language}">', html.escape(content, quote=False), "</pre>"]
    fence = "`" * max(3, _longest_backticks(content) + 1)
    return [f"{fence}{language}", content, fence]


def _longest_backticks(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)
