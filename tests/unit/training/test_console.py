"""Console output, on a terminal and in a log file."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest

from dist_ft.training.console import Console, format_duration, format_progress, format_table


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


def test_file_has_every_line():
    stream = io.StringIO()
    console = Console(stream)
    for text in ("step 1", "step 2"):
        console.show_progress(text)
    console.print("done")
    assert stream.getvalue() == "step 1\nstep 2\ndone\n"


def test_terminal_shows_one_progress_line():
    stream = Terminal()
    console = Console(stream)
    for text in ("step 1", "step 2"):
        console.show_progress(text)
    console.print("done")
    console.print("bye")
    console.show_progress("step 3")
    console.close()
    console.close()
    assert stream.getvalue() == "\r\x1b[2Kstep 1\r\x1b[2Kstep 2\ndone\nbye\n\r\x1b[2Kstep 3\n"


def test_characters_the_stream_cannot_encode_are_replaced():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    Console(stream).print("2 × 3")
    assert raw.getvalue() == b"2 ? 3\n"


def test_reader_that_has_left_does_not_end_the_run():
    """As in `dist-ft train | head`: lost output must not raise or change the exit code."""
    program = (
        "import sys, time\nfrom dist_ft.training.console import Console\nconsole = Console()\n"
        "console.print('first')\nsys.stdin.read()\n"
        "for _ in range(3): console.print('more'); console.show_progress('step'); console.close()\n"
        "sys.stderr.write('trained on')"
    )
    ran = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert ran.stdin and ran.stdout and ran.stderr
    assert ran.stdout.readline() == "first\n"
    ran.stdout.close()
    ran.stdin.close()
    assert ran.stderr.read() == "trained on"
    assert ran.wait() == 0
    ran.stderr.close()


def test_default_stream_is_standard_output(capsys):
    Console().print("text")
    assert capsys.readouterr().out == "text\n"


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0, "0:00:00"), (59.6, "0:01:00"), (3661, "1:01:01"), (-5, "0:00:00"), (360000, "100:00:00")],
)
def test_durations_are_hours_minutes_seconds(seconds, expected):
    assert format_duration(seconds) == expected


def test_progress_line_shows_step_loss_and_speed():
    values = {
        "loss": 1.23456,
        "learning_rate": 2e-5,
        "grad_norm": 0.987,
        "tokens_per_s": 12345.6,
        "step_s": 0.5,
    }
    assert format_progress(7, 120, values, 56.5) == (
        "step   7/120  loss 1.2346  lr 2.00e-05  grad 0.99  12,346 tok/s  0.50 s/step  left 0:00:56"
    )
    assert "grad nan" in format_progress(7, 120, {**values, "grad_norm": float("nan")}, 0)


def test_table_wraps_long_cells():
    text = format_table("run x", [("model", "a/b"), ("long", "word " * 40)])
    lines = text.splitlines()
    assert lines[0].strip() == "run x" and any("model" in line and "a/b" in line for line in lines)
    assert max(len(line) for line in lines) <= 100 and text.count("word") == 40
