"""Errors of tokenizing: a text that a tokenizer cannot take, whatever its code raises.

Most tokenizers take any Unicode text. A lone surrogate is none, and a pattern of tokenizer.json can
fail on a text that it would take too many steps for; native code then panics.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from dist_ft.core.errors import DistFtError
from dist_ft.core.native_errors import first_line, is_panic


class UntokenizableError(Exception):
    """A text that the tokenizer cannot take; its text is that of the tokenizer's own error."""


@contextlib.contextmanager
def tokenizing_errors() -> Iterator[None]:
    """Convert any error of a tokenizer, a panic included, into an `UntokenizableError`."""
    try:
        yield
    except (DistFtError, MemoryError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and not is_panic(error):
            raise  # Ctrl-C, or the end of the process
        raise UntokenizableError(first_line(error)) from error


def describe(error: UntokenizableError) -> str:
    """Return the problem and its remedy, for a message that starts with the place of the text."""
    return (
        f"the tokenizer cannot take its text ({error}). Valid Unicode is needed, and a tokenizer "
        "that accepts it. Correct the text, or use another tokenizer"
    )


def find_error(tokenizer: Any, row: Mapping[str, Any]) -> UntokenizableError | None:
    """Return the error of the first text in `row` that the tokenizer cannot take."""
    for text in _texts(row):
        try:
            with tokenizing_errors():
                tokenizer(text)
        except UntokenizableError as error:
            return error
    return None


def _texts(value: Any) -> Iterator[str]:
    """Yield all texts in a value of a row."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _texts(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _texts(part)
