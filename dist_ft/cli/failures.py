"""How the command line ends: every failure is one clear text on stderr and an exit code.

Exit codes: 1 the run failed, 2 the input needs a correction, 3 the run reached its limit of time or
cost, 130 the user stopped it. A traceback is printed only with --debug (or DIST_FT_DEBUG=1).
"""

from __future__ import annotations

import errno
import os
import re
import sys
from typing import Any

from dist_ft.core.errors import (
    ConfigError,
    DataError,
    DistFtError,
    DocumentError,
    Interrupted,
    ModelError,
    StorageError,
    explain_library_error,
)

_ADVICE = {
    errno.ENOSPC: "The disk is full. Free some space.",
    errno.EDQUOT: "The quota of the disk is used up. Free some space.",
    errno.EFBIG: "The file is too large for the file system or the limit (ulimit -f).",
    errno.EROFS: "The file system is read-only. Choose another folder.",
    errno.EACCES: "Access is denied. Check the permissions.",
    errno.EPERM: "Access is denied. Check the permissions.",
    errno.ENOENT: "Check the path.",
    errno.ENOTDIR: "A part of the path is a file. Check the path.",
    errno.EISDIR: "A file is needed, and this is a folder. Check the path.",
    errno.ENAMETOOLONG: "The name is too long for the file system. Choose a shorter one.",
    errno.ELOOP: "Symbolic links lead in a circle. Check the path.",
    errno.EMFILE: "The process may not open more files. Raise the limit (ulimit -n).",
    errno.ENFILE: "The machine may not open more files. Raise its limit (fs.file-max).",
    errno.ENOMEM: "The machine has no memory left.",
}
"""What to do about an error of the operating system."""

_NAME = re.compile(r"-{0,2}[a-z]{1,20}(?:-[a-z0-9]{1,20}){0,3}")
"""What looks like the name of a command or of an option."""


def report_error(error: BaseException) -> int:
    """Print `error` for the user and return the exit code."""
    if hasattr(error, "format_message") and hasattr(error, "exit_code"):
        return _report_usage(error)

    explained = _explain(error)
    if explained is not None:
        return _print_failure(_message(explained), explained.exit_code, error)
    return _print_failure(_unexpected(error), 1, error)


def _explain(error: BaseException) -> DistFtError | None:
    """Return the error as one that a user can act on; None if it is a bug of dist_ft."""
    if isinstance(error, DistFtError):
        return error
    if isinstance(error, KeyboardInterrupt):
        return Interrupted("stopped by the user.")

    # Too little memory, or the end of another worker, is no bug of dist_ft.
    explained = explain_library_error(error)
    if explained is not None:
        return explained

    if isinstance(error, RecursionError):
        return DataError(
            "an input is nested too deeply: Python's stack is exhausted. Give one with fewer "
            "levels. --debug shows where it was read."
        )

    # Names of files and texts of rows are what others wrote; most are checked where they are read.
    if isinstance(error, UnicodeError):
        return DataError(
            f"a name or text of an input is not UTF-8 ({_one_line(error)}). Rename or convert it. "
            "--debug shows where it was used."
        )

    if isinstance(error, BrokenPipeError):
        return DistFtError("the reader of the output has left before everything was printed.")
    if isinstance(error, OSError):
        return _operating_system_error(error)
    return None


def _operating_system_error(error: OSError) -> DistFtError:
    """Return an error about a path, or about the machine if the error names none."""
    what = error.strerror or _one_line(error) or type(error).__name__
    if error.filename is not None:
        name = os.fsdecode(error.filename) if isinstance(error.filename, bytes) else error.filename
        what = f"{name}: {what}"

    # A wrong path needs another command; a full disk does not.
    advice = _ADVICE.get(error.errno or 0, "--debug shows which call failed.")
    text = f"{what}. {advice}"
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP):
        return DataError(text)
    return DistFtError(text)


def _report_usage(error: Any) -> int:
    """Print the parser's error about the arguments without quoting them; return the exit code.

    An argument that is not understood may be a credential: `--token VALUE`, a value after a space.
    """
    if type(error).__name__ == "NoArgsIsHelpError":  # the help of a group of commands
        error.show(file=sys.stderr)
        return int(error.exit_code)

    # Names of commands and options are quoted, as most of these errors are their misspellings.
    may_quote = error.message.startswith(("No such command", "No such option"))
    for argument in sys.argv[1:]:
        is_name = _NAME.fullmatch(argument) is not None
        for part in (argument, argument.partition("=")[2]):
            if len(part) > 2 and not (may_quote and is_name):
                for spelling in (part, repr(part)[1:-1]):
                    error.message = error.message.replace(spelling, "...")

    # A value that the shell or the parser changed.
    if not may_quote and not error.message.startswith(("Missing", "Option")):
        error.message = re.sub(r"^(['\"]).*\1(?= is )", "it", error.message, flags=re.DOTALL)
    error.show(file=sys.stderr)
    return int(error.exit_code)


def leave(code: int) -> None:
    """Exit with `code`.

    A process that joined a torch process group ends through `runtime.local`, if that was imported.
    """
    _flush_output()

    # Not imported here: a command that never trained must not wait for torch in order to end.
    local = sys.modules.get("dist_ft.runtime.local")
    exit_process = local.exit_process if local else sys.exit
    exit_process(code)


def _flush_output() -> None:
    """Write what is buffered; output that nobody reads any more is dropped."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        # Python flushes again at exit, and would print an error of its own.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def _message(error: DistFtError) -> str:
    from dist_ft.core.logs import redact
    from dist_ft.core.printable import printable, printable_line, shorten

    # Problems of a config are one line each, whatever newlines a value has.
    if isinstance(error, ConfigError):
        problems = [shorten(printable_line(redact(problem))) for problem in error.problems]
        return f"dist-ft: {ConfigError(problems, shorten(printable_line(redact(error.source))))}"

    # A newline in a name or a row of data must not look like a second message.
    text = redact(f"dist-ft: {error}")
    if isinstance(error, DataError | DocumentError | ModelError | StorageError):
        return shorten(printable_line(text))
    return "\n".join(shorten(line) for line in printable(text).split("\n"))


def _print_failure(text: str, code: int, error: BaseException) -> int:
    if os.environ.get("DIST_FT_DEBUG") == "1":
        import traceback

        from dist_ft.core.logs import redact
        from dist_ft.core.printable import printable

        # The arguments of library calls are in a traceback, and with them URLs and tokens.
        trace = redact("".join(traceback.format_exception(error)))
        print(printable(trace), file=sys.stderr)

    # After the traceback, so that the message is the last line on the screen.
    print(text, file=sys.stderr)
    return code


def _one_line(error: BaseException) -> str:
    """Return the start of an error's text, on one line and without credentials."""
    from dist_ft.core.logs import redact
    from dist_ft.core.printable import printable_line

    return printable_line(redact(" ".join(str(error).split())))[:200]


def _unexpected(error: BaseException) -> str:
    """Save the traceback to a file and return the message that names it."""
    import tempfile
    import traceback

    from dist_ft.core.logs import redact

    summary = (
        f"dist-ft: unexpected {type(error).__name__}: {_one_line(error)}. This is a bug in dist_ft."
    )

    # Kept for the bug report: the user may have closed the terminal by then.
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="dist-ft-", suffix=".log", delete=False, encoding="utf-8", errors="replace"
        ) as file:
            file.write(redact("".join(traceback.format_exception(error))))
    except OSError as unwritten:
        return (
            f"{summary} The traceback cannot be saved ({unwritten.strerror}): repeat with --debug."
        )

    return f"{summary} The traceback is in {file.name}. Please report it."
