"""Streams that redact all that this process prints."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from dist_ft.core.redaction import redact


class RedactingStream:
    """A text stream that redacts all that is written to it; else the stream below."""

    def __init__(self, stream: Any, is_content: bool = False) -> None:
        """Write to `stream`; `is_content` as in `redact`."""
        self._stream = stream
        self._is_content = is_content

    def write(self, text: str) -> int:
        """Write `text` without credentials."""
        self._stream.write(redact(text, self._is_content))
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Write several texts."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._stream)


@contextlib.contextmanager
def redacted_output() -> Iterator[None]:
    """Within: nothing that Python code of this process prints holds a credential.

    For processes of dist_ft, not for those of users. Code in C that writes to the descriptor itself
    is not covered.
    """
    before = sys.stdout, sys.stderr
    redact_output()
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def redact_output() -> None:
    """As `redacted_output`, for the rest of the process."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        # None: a process without a terminal (pythonw, some daemons).
        if stream is not None and not isinstance(stream, RedactingStream):
            # Results are printed on standard output: data, generated texts, manifests.
            setattr(sys, name, RedactingStream(stream, is_content=name == "stdout"))
