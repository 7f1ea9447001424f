"""How the command line ends: every failure is one clear text on stderr and an exit code.

Exit codes: 1 the run failed, 2 the input needs a correction, 130 the user stopped it. A traceback
is printed only with --debug (or DIST_FT_DEBUG=1).
"""

from __future__ import annotations

import os
import re
import sys
from typing import Any

from dist_ft.core.errors import DistFtError, explain_library_error

_NAME = re.compile(r"-{0,2}[a-z]{1,20}(?:-[a-z0-9]{1,20}){0,3}")
"""What looks like the name of a command or of an option."""


def report_error(error: Exception) -> int:
    """Print `error` for the user and return the exit code."""
    if hasattr(error, "format_message") and hasattr(error, "exit_code"):
        return _report_usage(error)
    if isinstance(error, DistFtError):
        return _print_failure(_message(error), error.exit_code, error)

    # Too little memory, or the end of another worker, is no bug of dist_ft.
    explained = explain_library_error(error)
    text = _unexpected(error) if explained is None else _message(explained)
    return _print_failure(text, 1, error)


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
    # Not imported here: a command that never trained must not wait for torch in order to end.
    local = sys.modules.get("dist_ft.runtime.local")
    exit_process = local.exit_process if local else sys.exit
    exit_process(code)


def _message(error: DistFtError) -> str:
    from dist_ft.core.logs import redact

    return redact(f"dist-ft: {error}")


def _print_failure(text: str, code: int, error: BaseException) -> int:
    if os.environ.get("DIST_FT_DEBUG") == "1":
        import traceback

        from dist_ft.core.logs import redact

        # The arguments of library calls are in a traceback, and with them URLs and tokens.
        print(redact("".join(traceback.format_exception(error))), file=sys.stderr)

    # After the traceback, so that the message is the last line on the screen.
    print(text, file=sys.stderr)
    return code


def _unexpected(error: Exception) -> str:
    """Save the traceback to a file and return the message that names it."""
    import tempfile
    import traceback

    from dist_ft.core.logs import redact

    # Kept for the bug report: the user may have closed the terminal by then.
    with tempfile.NamedTemporaryFile(
        "w", prefix="dist-ft-", suffix=".log", delete=False, encoding="utf-8"
    ) as file:
        file.write(redact("".join(traceback.format_exception(error))))

    # On one line: the whole text is in the file.
    summary = redact(" ".join(str(error).split()))[:200]
    return (
        f"dist-ft: unexpected {type(error).__name__}: {summary}. This is a bug in dist_ft. "
        f"The traceback is in {file.name}. Please report it."
    )
