"""Streams that redact what is printed."""

from __future__ import annotations

import io
import subprocess
import sys

from dist_ft.core.output import RedactingStream, redacted_output


def test_what_is_printed_holds_no_credential(monkeypatch, capsys):
    monkeypatch.setenv("MY_TOKEN", "s3cr3tValue1977")
    before = sys.stdout, sys.stderr
    with redacted_output():
        print("out s3cr3tValue1977", 3, end="!\n")
        print("err s3cr3tValue1977", file=sys.stderr)
        sys.stdout.writelines(["a\n", "s3cr3tValue1977\n"])
    assert (sys.stdout, sys.stderr) == before
    assert capsys.readouterr() == (
        "out <MY_TOKEN> 3!\na\n<MY_TOKEN>\n",
        "err <MY_TOKEN>\n",
    )


def test_results_are_printed_as_they_are(monkeypatch, capsys):
    """A model may generate code with a password in it; only what is secret by itself is hidden."""
    monkeypatch.setenv("MY_TOKEN", "s3cr3tValue1977")
    text = 'connect(password="abc-123")  # https://u:{}@host, {}'
    with redacted_output():
        for stream in (sys.stdout, sys.stderr):
            print(text.format("pw-7x", "s3cr3tValue1977"), file=stream)
    hidden = "# https://<redacted>@host, <MY_TOKEN>\n"
    assert capsys.readouterr() == (
        f'connect(password="abc-123")  {hidden}',
        f'connect(password="<redacted>")  {hidden}',
    )


def test_a_stream_keeps_its_other_properties():
    below = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    stream = RedactingStream(below)
    assert (stream.encoding, stream.isatty(), stream.writable()) == ("latin-1", False, True)
    assert stream.write("abc") == 3


def test_uncaught_errors_and_warnings_of_a_process_hold_no_credential():
    code = (
        "import os, threading, warnings\n"
        "from dist_ft.core.output import redact_output\n"
        "redact_output(); redact_output()\n"
        "secret = os.environ['MY_TOKEN']\n"
        "warnings.warn('warning ' + secret)\n"
        "def fail(): raise ValueError('thread ' + secret)\n"
        "thread = threading.Thread(target=fail); thread.start(); thread.join()\n"
        "raise RuntimeError('main ' + repr(secret))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"MY_TOKEN": "s3cr3t\"Value'1977", "PATH": "", "PYTHONPATH": ":".join(sys.path)},
    )
    assert done.returncode == 1
    assert "s3cr3t" not in done.stdout + done.stderr
    for word in ("warning <MY_TOKEN>", "thread <MY_TOKEN>", "RuntimeError: main"):
        assert word in done.stderr
