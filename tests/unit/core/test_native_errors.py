"""Panics of native code, which are no exceptions, become errors."""

from __future__ import annotations

import pytest

from dist_ft.core.errors import WorkerError, explain_library_error
from dist_ft.core.native_errors import NativeError, first_line, is_panic, panics_as_errors


class PanicException(BaseException):
    """Named as those of Rust's extension modules."""


def test_panics_become_errors_and_nothing_else_does():
    expected = pytest.raises(NativeError, match="its native code failed: index out of bounds")
    with expected, panics_as_errors():
        raise PanicException("index out of bounds\nat line 5")
    with pytest.raises(KeyboardInterrupt), panics_as_errors():
        raise KeyboardInterrupt
    assert is_panic(PanicException()) and not is_panic(ValueError())


def test_a_panic_that_passed_all_handlers_is_explained():
    explained = explain_library_error(PanicException("index out of bounds"))
    assert isinstance(explained, WorkerError)
    assert "native code of a library failed (index out of bounds)" in str(explained)


def test_first_line_is_short():
    assert first_line(ValueError("\n a \n b")) == "a"
    assert first_line(ValueError()) == "ValueError"
    assert len(first_line(ValueError("x" * 10_000))) == 200
