"""What passes between the driver and the workers of a run on Ray. Light: its actor must start fast."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from dist_ft.errors import DistFtError
from dist_ft.logs import redact
from dist_ft.train.console import Console
from dist_ft.train.result import Result

MOST_LINES = 2000
"""Held for a driver that does not fetch them; older ones are left out, and it is told how many."""


class Relay:
    """An actor between driver and workers: lines and outcomes one way, the wish to stop the other."""

    def __init__(self) -> None:
        self._lines: deque[tuple[str, str]] = deque(maxlen=MOST_LINES)
        self._num_left_out = 0
        self._heard_at: float | None = None
        self._outcome: Result | DistFtError | None = None
        self._stop = False

    def put(self, kind: str, text: str) -> None:
        """Take a line (`kind` is "say" or "progress" of rank 0's console, or "log" of any rank)."""
        self._num_left_out += len(self._lines) == MOST_LINES
        self._lines.append((kind, text))

    def take(self) -> list[tuple[str, str]]:
        """Return the lines since the last call."""
        lines = [("log", f"WARNING {self._num_left_out} lines of the workers are left out here")] * bool(
            self._num_left_out) + list(self._lines)
        self._lines.clear()
        self._num_left_out = 0
        return lines

    def end(self, outcome: Result | DistFtError) -> None:
        """Note how the run ended: a result, or an error that starting again would not cure."""
        self._outcome = self._outcome or outcome

    def outcome(self) -> Result | DistFtError | None:
        """Return what `end` noted."""
        return self._outcome

    def stop(self) -> None:
        """Ask the workers to save and leave."""
        self._stop = True

    def beat(self) -> bool:
        """Note that rank 0 lives; tell it whether the workers should save and leave."""
        self._heard_at = time.monotonic()
        return self._stop

    def silent_s(self) -> float | None:
        """Return the seconds since rank 0 was last heard of; None: never."""
        return None if self._heard_at is None else time.monotonic() - self._heard_at


class RelayConsole(Console):
    """A console whose lines appear on the driver's terminal."""

    def __init__(self, relay: Any) -> None:
        super().__init__()
        self._relay = relay

    def say(self, text: str) -> None:
        """Send `text` to be printed on lines of its own."""
        self._relay.put.remote("say", text)

    def progress(self, text: str) -> None:
        """Send `text` to be shown as the current progress line."""
        self._relay.put.remote("progress", text)


class RelayLog(logging.Handler):
    """A log handler whose lines appear on the driver's terminal."""

    def __init__(self, relay: Any) -> None:
        super().__init__()
        self._relay = relay

    def emit(self, record: logging.LogRecord) -> None:
        """Send the formatted record (`logs.setup` gives the format, which removes credentials)."""
        try:
            self._relay.put.remote("log", self.format(record))
        except Exception:
            self.handleError(record)


def show(console: Console, lines: Sequence[tuple[str, str]]) -> None:
    """Show what `Relay.take` returned: console lines on the console, log lines on stderr, in their order."""
    for kind, text in lines:
        if kind != "log":
            getattr(console, kind)(text)
            continue
        console.close()
        with contextlib.suppress(OSError):
            print(redact(text), file=sys.stderr, flush=True)
