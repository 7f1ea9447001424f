"""Reads JSON that this process did not write: bounded, and every failure is one clear reason.

Bounds: depth, size where the caller names one, digits of a number, no duplicate keys. Without them
a file of brackets exhausts the stack (of this reader, or of whatever walks the value later), and of
two keys of one name the first would be ignored silently.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dist_ft.core.errors import DistFtError, DocumentError
from dist_ft.core.printable import printable_line

MAX_DEPTH = 100
"""Nested lists and objects. Python's own parser fails at a depth that depends on the caller."""
MAX_REASON = 200
"""Characters of a reason in a message."""
RESTORE = "Restore the file from a copy, or remove it."
"""What to do about a file that dist_ft wrote and that is damaged."""

_NOT_BRACKETS = bytes(sorted(set(range(256)) - set(b"[]{}")))
_STEPS = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}


def decode_json(content: bytes | str) -> Any:
    """Return the value in JSON text.

    Raises:
        ValueError: not JSON, nested too deeply, a duplicate key, or a number of thousands of
            digits; the text is a short reason.
    """
    if nested_deeper(content, MAX_DEPTH):
        raise ValueError(f"nested more than {MAX_DEPTH} deep")

    try:
        if isinstance(content, bytes):
            # As `json.loads` does, which would build a new decoder for each row.
            content = content.decode(json.detect_encoding(content), "surrogatepass")
        return _DECODER.decode(content)
    except json.JSONDecodeError as error:
        place = f"column {error.colno}"
        if error.lineno > 1:
            place = f"line {error.lineno} {place}"
        raise ValueError(f"{error.msg} at {place}") from None
    except UnicodeDecodeError:
        raise  # the caller may know which line the byte is in
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except ValueError as error:
        # Python's limit of digits names a function that the user cannot call.
        if "integer string conversion" in str(error):
            raise ValueError("a number of thousands of digits") from None
        raise


def nested_deeper(content: bytes | str, max_depth: int) -> bool:
    """Return whether lists and objects in JSON text are nested more than `max_depth` deep."""
    if isinstance(content, str):
        content = content.encode("utf-8", "surrogatepass")

    # Nearly all texts have fewer brackets than that in total.
    if content.count(b"[") + content.count(b"{") <= max_depth:
        return False

    # Without escapes, each quote starts or ends a string, and every second part lies in one. Pairs
    # of backslashes first: the second of a pair escapes nothing.
    plain = content.replace(b"\\\\", b"").replace(b'\\"', b"")
    outside = b"".join(plain.split(b'"')[::2])
    brackets = outside.translate(None, _NOT_BRACKETS)
    depths = itertools.accumulate(map(_STEPS.__getitem__, brackets))
    return max(depths, default=0) > max_depth


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"duplicate key {printable_line(twice)[:MAX_REASON]!r}")
    return values


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)


def parse_json(content: bytes | str, name: str, remedy: str = RESTORE) -> Any:
    """Return the value in JSON text that `name` holds, for messages; `remedy` is what to do.

    Raises:
        DocumentError: empty, not JSON, or beyond the bounds of `decode_json`.
    """
    if not content.strip():
        raise DocumentError(f"{name}: is empty. It must hold JSON. {remedy}")

    try:
        return decode_json(content)
    except ValueError as error:
        reason = str(error)[:MAX_REASON]
        if isinstance(error, UnicodeDecodeError):
            reason = f"byte {error.start} is not UTF-8"
        raise DocumentError(f"{name}: is not valid JSON ({reason}). {remedy}") from error


def parse_json_object(content: bytes | str, name: str, remedy: str = RESTORE) -> dict[str, Any]:
    """As `parse_json`, for text that must be one object."""
    value = parse_json(content, name, remedy)
    if not isinstance(value, dict):
        raise DocumentError(
            f"{name}: is a {type(value).__name__}. It must be a JSON object. {remedy}"
        )
    return value


def encode_json(value: Any, indent: int | None = None) -> bytes:
    """Return `value` as readable JSON in UTF-8; one with lone surrogates is escaped to ASCII."""
    text = json.dumps(value, indent=indent, ensure_ascii=False, default=str)
    try:
        return text.encode()
    except UnicodeEncodeError:
        # UTF-8 has no surrogates, JSON's escapes do: the value stays what it is.
        return json.dumps(value, indent=indent, default=str).encode()


@contextmanager
def interpreting(name: str, remedy: str = RESTORE) -> Iterator[None]:
    """Within: the value of `name` is used; a form that does not fit is one `DocumentError`.

    For files of many fields, whose every use would otherwise need its own check. Only for plain
    steps on the value itself: errors of storage or of dist_ft must not be hidden in it.
    """
    try:
        yield
    except DistFtError:
        raise  # says already what is wrong
    except _FORM_ERRORS as error:
        reason = f"{type(error).__name__}: {error}"
        reason = printable_line(reason)[:MAX_REASON]
        raise DocumentError(
            f"{name}: does not have the form that dist_ft writes ({reason}). {remedy}"
        ) from error


_FORM_ERRORS = (
    ValueError,
    KeyError,
    IndexError,
    TypeError,
    AttributeError,
    OverflowError,
    ZeroDivisionError,
    RecursionError,
)
