"""What passes between the driver and the workers of a run on Ray. Light: its actor must start fast."""

from __future__ import annotations

from typing import Any

from dist_ft.errors import DistFtError
from dist_ft.train.console import Console
from dist_ft.train.result import Result


class Relay:
    """An actor between driver and workers: lines and outcomes one way, the wish to stop the other."""

    def __init__(self) -> None:
        self._lines: list[tuple[str, str]] = []
        self._outcome: Result | DistFtError | None = None
        self._stop = False

    def put(self, kind: str, text: str) -> None:
        """Take a line from rank 0 (`kind` is "say" or "progress")."""
        self._lines.append((kind, text))

    def take(self) -> list[tuple[str, str]]:
        """Return the lines since the last call."""
        lines, self._lines = self._lines, []
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

    def stopping(self) -> bool:
        """Tell whether the workers should save and leave."""
        return self._stop


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
