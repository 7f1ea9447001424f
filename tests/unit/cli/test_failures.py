"""How commands end: every kind of failure is one line and a documented exit code."""

from __future__ import annotations

import errno
import os
from typing import Any

import pytest

from dist_ft.cli import failures, output
from dist_ft.core.errors import ConfigError, DataError, DocumentError, StorageError


class PanicException(BaseException):
    """As pyo3 raises it: of this name, and no Exception."""


def os_error(number: int, path: Any = "/some/file") -> OSError:
    return OSError(number, os.strerror(number), path)


CASES: dict[str, tuple[BaseException, int, str]] = {
    "recursion": (RecursionError("maximum recursion depth"), 2, "nested too deeply"),
    "memory": (MemoryError(), 1, "out of memory"),
    "panic": (
        PanicException("called `Option::unwrap()`\non a `None`"),
        1,
        "native code of a library",
    ),
    "decoding": (UnicodeDecodeError("utf-8", b"a\xff", 1, 2, "invalid"), 2, "is not UTF-8"),
    "encoding": (UnicodeEncodeError("utf-8", "a\udcff", 1, 2, "surrogates"), 2, "is not UTF-8"),
    "unknown": (OSError(errno.ETIMEDOUT, "Connection timed out"), 1, "Connection timed out."),
    "unnumbered": (OSError("it is gone\nfor good"), 1, "it is gone for good"),
    "ctrl-c": (KeyboardInterrupt(), 130, "stopped by the user"),
    "pipe": (BrokenPipeError(errno.EPIPE, "Broken pipe"), 1, "reader of the output has left"),
    "full": (os_error(errno.ENOSPC), 1, "disk is full"),
    "quota": (os_error(errno.EDQUOT), 1, "quota"),
    "denied": (os_error(errno.EACCES), 1, "Check the permissions"),
    "read-only": (os_error(errno.EROFS), 1, "read-only"),
    "absent": (os_error(errno.ENOENT), 2, "/some/file: No such file"),
    "name": (os_error(errno.ENAMETOOLONG), 2, "too long"),
    "loop": (os_error(errno.ELOOP), 2, "in a circle"),
    "folder": (os_error(errno.EISDIR), 2, "this is a folder"),
    "files": (os_error(errno.EMFILE, None), 1, "ulimit -n"),
    "bytes": (os_error(errno.EACCES, b"/a\xff"), 1, r"/a\udcff"),
    "document": (DocumentError("a.json: is empty."), 2, "a.json: is empty"),
}


@pytest.mark.parametrize(("error", "code", "text"), CASES.values(), ids=CASES)
def test_a_failure_is_one_line(
    error: BaseException, code: int, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert failures.report_error(error) == code

    shown = capsys.readouterr().err
    assert text in shown
    assert shown.startswith("dist-ft: ") and shown.count("\n") == 1
    assert "unexpected" not in shown


def test_a_bug_is_one_line_too(capsys: pytest.CaptureFixture[str]) -> None:
    error = ZeroDivisionError("one\x1b]0;owned\x07\ntwo\udcff")
    assert failures.report_error(error) == 1

    shown = capsys.readouterr().err
    assert "unexpected ZeroDivisionError" in shown and "\\x1b]0;owned" in shown
    assert shown.count("\n") == 1 and "\x1b" not in shown
    os.remove(shown.split("traceback is in ")[1].split(". ")[0].removesuffix("."))


def test_a_bug_on_a_full_disk_is_one_line_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*args: Any, **kwargs: Any) -> Any:
        raise os_error(errno.ENOSPC)

    monkeypatch.setattr("tempfile.NamedTemporaryFile", full)
    assert failures.report_error(ZeroDivisionError("x")) == 1
    assert "cannot be saved (No space left on device)" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [DataError, StorageError, DocumentError])
def test_names_in_errors_cannot_forge_lines(
    kind: type[Exception], capsys: pytest.CaptureFixture[str]
) -> None:
    failures.report_error(kind("a\ndist-ft: ok\x1b[2J\r: is bad."))
    shown = capsys.readouterr().err
    assert shown == "dist-ft: a\\ndist-ft: ok\\x1b[2J\\x0d: is bad.\n"


def test_each_problem_of_a_config_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    failures.report_error(ConfigError(["a=x\ny: no.", "b\x1b[1m: no."], "my\nfile.yaml"))
    assert capsys.readouterr().err == (
        "dist-ft: my\\nfile.yaml: 2 problems\n  - a=x\\ny: no.\n  - b\\x1b[1m: no.\n"
    )


def test_what_commands_print_is_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    output.echo("label \x1b]52;c;eA==\x07\nnext")
    output.echo("error \x9b31m", err=True)
    output.echo_json('{"a": "\x9b\u202e"}')
    output.write_log("\x1b[36m(worker)\x1b[0m 10%\r20%\r\n\x1b]0;owned\x07")

    captured = capsys.readouterr()
    assert captured.out == (
        "label \\x1b]52;c;eA==\\x07\nnext\n"
        '{"a": "\\u009b\\u202e"}\n'
        "(worker) 10%\n20%\n\\x1b]0;owned\\x07"
    )
    assert captured.err == "error \\x9b31m\n"


def test_a_long_value_does_not_fill_the_screen(capsys: pytest.CaptureFixture[str]) -> None:
    long = "a" * 100_000
    for error in (ConfigError([f"run.name={long}: too long. Shorten it."], long), DataError(long)):
        failures.report_error(error)
        assert len(capsys.readouterr().err) < 4000
