"""Errors of code that is not Python: tokenizers and safetensors are written in Rust.

A panic there arrives as a `PanicException`, which is no `Exception` and would pass every handler up
to the interpreter's own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from dist_ft.core.errors import MAX_LINE

_PANIC = "PanicException"


class NativeError(Exception):
    """A panic in native code, as an error that handlers catch."""


def is_panic(error: BaseException) -> bool:
    """Whether `error` is a panic of native code."""
    return type(error).__name__ == _PANIC


@contextlib.contextmanager
def panics_as_errors() -> Iterator[None]:
    """Convert panics into `NativeError`."""
    try:
        yield
    except BaseException as error:
        # By name: each extension module has a class of its own, which none of them exports.
        if is_panic(error):
            raise NativeError(f"its native code failed: {first_line(error)}") from error
        raise


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, at most `MAX_LINE` characters of it."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].strip()[:MAX_LINE]
