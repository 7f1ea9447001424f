"""What a person sees: tables at start and end, and one progress line a step that is rewritten on a terminal."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Sequence
from typing import TextIO


class Console:
    """Prints lines; on a terminal a progress line replaces the one before."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        self._live = self._stream.isatty()
        self._open = False
        self._gone = False

    def say(self, text: str) -> None:
        """Print `text` on lines of its own."""
        self.close()
        self._write(f"{text}\n")

    def close(self) -> None:
        """End the progress line, if one is shown: what others print begins on a line of its own."""
        if self._open:
            self._write("\n")
            self._open = False

    def progress(self, text: str) -> None:
        """Show `text` as the current progress line."""
        if not self._live:
            return self.say(text)
        self._write(f"\r\x1b[2K{text}")
        self._open = True
        return None

    def _write(self, text: str) -> None:
        """Write what the stream's encoding can say: neither a missing × nor a reader that left may end a run."""
        if self._gone:
            return
        encoding = self._stream.encoding or "utf-8"
        try:
            self._stream.write(text.encode(encoding, "replace").decode(encoding))
            self._stream.flush()
        except OSError:  # `| head` has seen enough, or the terminal was closed
            self._gone = True
            with contextlib.suppress(OSError), open(os.devnull, "w") as nothing:
                os.dup2(
                    nothing.fileno(), self._stream.fileno()
                )  # or Python's flush at exit would fail once more


def table(title: str, rows: Sequence[Sequence[str]], heads: Sequence[str] = ("", "")) -> str:
    """Return a table as text, at most 100 characters wide; it has a column for each of `heads`, shown if not empty."""
    from rich import box
    from rich.console import Console as Rich
    from rich.table import Table

    drawn = Table(
        title=title, title_justify="left", box=box.SIMPLE, show_header=any(heads), pad_edge=False
    )
    drawn.add_column(heads[0], style="bold", no_wrap=True)
    for head in heads[1:]:
        drawn.add_column(head, overflow="fold")
    for row in rows:
        drawn.add_row(*row)
    stream = io.StringIO()
    Rich(file=stream, width=100).print(drawn)
    return stream.getvalue().rstrip()


def duration(seconds: float) -> str:
    """Return h:mm:ss."""
    whole = max(0, round(seconds))
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def progress_line(step: int, total: int, values: dict[str, float], seconds_left: float) -> str:
    """Return the progress line of one step (`step` counts from 1)."""
    width = len(str(total))
    return (
        f"step {step:>{width}}/{total}  loss {values['loss']:.4f}  lr {values['learning_rate']:.2e}  "
        f"grad {values['grad_norm']:.2f}  {values['tokens_per_s']:,.0f} tok/s  {values['step_s']:.2f} s/step  "
        f"left {duration(seconds_left)}"
    )


def evaluation_line(values: dict[str, float]) -> str:
    """Return what one evaluation found: the loss, then the task's metrics."""
    others = [
        f"{name.replace('_', ' ')} {value:.{2 if name == 'perplexity' else 3}f}"
        for name, value in values.items()
        if name not in ("loss", "num_target_tokens")
    ]
    return f"{values['loss']:.4f} ({', '.join(others)})" if others else f"{values['loss']:.4f}"
