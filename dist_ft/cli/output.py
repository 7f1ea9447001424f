"""What commands print: the only door to standard output, which escapes control characters.

Names, labels, rows, generated text and manifests come from others: a terminal would execute escape
sequences in them. JSON and YAML for programs keep their value.
"""

from __future__ import annotations

import sys

import typer


def echo(text: str, err: bool = False, end: str = "\n") -> None:
    """Print text for people, on stderr with `err`; its own newlines stay."""
    # Imported when a command runs, here as in all commands: `--help` has to be fast.
    from dist_ft.core.printable import printable

    typer.echo(printable(text) + end, err=err, nl=False)


def echo_json(text: str) -> None:
    """Print JSON for programs: control characters are escaped as JSON does."""
    from dist_ft.core.printable import printable_json

    typer.echo(printable_json(text))


def echo_yaml(text: str) -> None:
    """Print YAML for programs as it is: its writer has quoted and escaped what needs it."""
    typer.echo(text, nl=False)


def write_log(text: str) -> None:
    """Print part of another program's log at once, without its colors."""
    from dist_ft.core.printable import printable, without_colors

    # Progress lines of other programs end with a carriage return.
    lines = without_colors(text).replace("\r\n", "\n").replace("\r", "\n")
    sys.stdout.write(printable(lines))
    sys.stdout.flush()


def forgive_encoding() -> None:
    """Print characters that the terminal's encoding lacks as escapes, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        # A test or a caller may have put another object in the place of the stream.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
