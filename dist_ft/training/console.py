"""Terminal output of a run: tables at the start and the end, and one progress line per step.

Control characters in what is printed are escaped: names, labels and generated text come from data.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Sequence
from typing import TextIO

from dist_ft.core.printable import printable, printable_line
from dist_ft.core.redaction import redact


class Console:
    """Prints lines. On a terminal a progress line replaces the progress line before it."""

    def __init__(self, stream: TextIO | None = None) -> None:
        """Print to `stream`; default: standard output."""
        self._stream = stream or sys.stdout
        self._is_terminal = self._stream.isatty()
        self._progress_shown = False
        self._stream_closed = False

    def print(self, text: str) -> None:
        """Print `text` on lines of its own."""
        # The progress line stays above the text, as the last state before it.
        self.close()
        self._write(f"{printable(text)}\n")

    def close(self) -> None:
        """End the progress line, if one is shown, so that other output starts on a new line."""
        if self._progress_shown:
            self._write("\n")
            self._progress_shown = False

    def show_progress(self, text: str) -> None:
        """Show `text` as the current progress line."""
        if not self._is_terminal:
            self.print(text)
            return

        # Back to the start of the line, and erase it: the new text may be shorter.
        self._write(f"\r\x1b[2K{printable_line(text)}")
        self._progress_shown = True

    def _write(self, text: str) -> None:
        """Write `text` in the stream's encoding, without credentials.

        A character that the encoding lacks or a reader that has left must not end a run.
        """
        if self._stream_closed:
            return

        encoding = self._stream.encoding or "utf-8"
        try:
            self._stream.write(redact(text).encode(encoding, "replace").decode(encoding))
            self._stream.flush()
        except OSError:  # the reader (such as `| head`) has left, or the terminal was closed
            self._stream_closed = True
            with contextlib.suppress(OSError), open(os.devnull, "w") as devnull:
                # Python flushes the stream at exit, which would fail again.
                os.dup2(devnull.fileno(), self._stream.fileno())


def format_table(
    title: str, rows: Sequence[Sequence[str]], headers: Sequence[str] = ("", "")
) -> str:
    """Return a table as text, at most 100 characters wide.

    Args:
        title: shown above the table.
        rows: cells; each row has one for each of `headers`.
        headers: headers of the columns; the header row is left out if all are empty.
    """
    from rich import box
    from rich.console import Console as RichConsole
    from rich.table import Table
    from rich.text import Text

    # As `Text`: rich takes a plain string for markup, and a label such as [/] for an error in it.
    def cell(text: str) -> Text:
        return Text(printable(str(text)))

    rich_table = Table(
        title=cell(title),
        title_justify="left",
        box=box.SIMPLE,
        show_header=any(headers),
        pad_edge=False,
    )
    # The first column names the row, and stays on one line; long values in the others are wrapped.
    rich_table.add_column(cell(headers[0]), style="bold", no_wrap=True)
    for header in headers[1:]:
        rich_table.add_column(cell(header), overflow="fold")

    for row in rows:
        rich_table.add_row(*map(cell, row))

    # A fixed width, so that a log file has the same table as any terminal.
    stream = io.StringIO()
    RichConsole(file=stream, width=100).print(rich_table)
    return stream.getvalue().rstrip()


def format_duration(seconds: float) -> str:
    """Return h:mm:ss."""
    whole = max(0, round(seconds))
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02d}:{whole % 60:02d}"


def format_progress(step: int, total: int, values: dict[str, float], seconds_left: float) -> str:
    """Return the progress line of one step (`step` counts from 1)."""
    # Numbers are padded, so that the fields of successive lines are in one column.
    width = len(str(total))
    fields = (
        f"step {step:>{width}}/{total}",
        f"loss {values['loss']:.4f}",
        f"lr {values['learning_rate']:.2e}",
        f"grad {values['grad_norm']:.2f}",
        f"{values['tokens_per_s']:,.0f} tok/s",
        f"{values['step_s']:.2f} s/step",
        f"left {format_duration(seconds_left)}",
    )
    return "  ".join(fields)


def format_evaluation(values: dict[str, float]) -> str:
    """Return the loss of an evaluation, then the other metrics in parentheses."""
    metrics = []
    for name, value in values.items():
        if name in ("loss", "num_target_tokens"):
            continue
        digits = 2 if name == "perplexity" else 3
        metrics.append(f"{name.replace('_', ' ')} {value:.{digits}f}")

    loss = f"{values['loss']:.4f}"
    if not metrics:
        return loss
    return f"{loss} ({', '.join(metrics)})"
