"""Runs one input in a forked process of its own, where it cannot do harm.

No connection leaves the process, no program is started, no signal sent, nothing written outside the
case's folder; what would train for long ends the process with the exit code `GUARDED`. Python's
audit hooks see all of that, except what native code does.
"""

from __future__ import annotations

import errno
import faulthandler
import importlib
import json
import os
import resource
import signal
import socket
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from fuzz.inputs import Input

GUARDED = 99
"""Exit code of a case that did what a test must not do: train for long, start Ray, ..."""
CRASHED = 98
"""Exit code of a case whose exception left the command line."""
MAX_STEPS = 8
"""Steps that a case may train."""
MAX_GROWTH_BYTES = 3 * 2**30
"""Memory that a case can get: the machine survives what a bomb does."""
MAX_FILE_BYTES = 256 * 2**20
PROGRAMS = ("git", "kubectl", "kustomize", "uname", "fc-list")
"""Programs that a command may start: they read (fc-list for the fonts of a report)."""
HARMLESS = ("/dev/null", "/dev/full", "/proc/self/")

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
PATHS_WRITTEN = {
    "os.mkdir": 1,
    "os.rmdir": 1,
    "os.remove": 1,
    "os.rename": 2,
    "os.link": 2,
    "os.symlink": 2,
    "os.truncate": 1,
    "os.chmod": 1,
    "os.chown": 1,
    "os.utime": 1,
}
"""Audit events -> how many of their first arguments are paths that change."""
STARTS = (
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.system",
    "os.fork",
    "os.forkpty",
    "pty.spawn",
)
NAME_LOOKUPS = ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr")
OWN_NAMES = (None, "", "localhost", "127.0.0.1", "0.0.0.0", socket.gethostname())
KILLS = ("os.kill", "os.killpg", "signal.pthread_kill")

STOPPED = (
    ("dist_ft.runtime.ray_backend.driver", "_connect"),
    ("dist_ft.workflows.ray_tune", "run"),
    ("dist_ft.inference.ray_data", "_connected"),
    ("dist_ft.selftest.drill", "run"),
    ("dist_ft.selftest.selftest", "run"),
)
"""Functions where Ray or many runs would start."""


class Reporter:
    """Sends what the case did to the parent, as lines of JSON."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def add(self, key: str, text: str) -> None:
        """Report `text` under `key`: outside, problem or guard."""
        line = json.dumps({key: text[:2000]}) + "\n"
        os.write(self._descriptor, line.encode())

    def guard(self, reason: str) -> NoReturn:
        """End the process: it was about to do what a test must not."""
        self.add("guard", reason)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(GUARDED)


def run(item: Input, root: Path, reporter: Reporter, log_descriptors: tuple[int, int]) -> NoReturn:
    """Run `item` in this process, which was forked for it, and end it.

    Args:
        item: the input; its files lie in root/home/project.
        root: the folder of the case.
        reporter: of this case.
        log_descriptors: files that stdout and stderr go to.
    """
    os.setsid()
    _redirect(log_descriptors)
    _limit()
    _enter(root)
    _stop_long_work(reporter)
    _install_guard(root, reporter)

    code = CRASHED
    try:
        code = _call(item, reporter) if item.call else _command(item, reporter)
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)


def _command(item: Input, reporter: Reporter) -> int:
    from dist_ft.cli import main
    from fuzz import siblings

    sys.argv = ["dist-ft", *item.words]
    try:
        main.main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)

    for problem in siblings.disagreements(item.words, code):
        reporter.add("problem", problem)
    return code


def _call(item: Input, reporter: Reporter) -> int:
    from fuzz import calls

    for problem in getattr(calls, item.call)(Path.cwd()):
        reporter.add("problem", problem)
    return 0


def _redirect(log_descriptors: tuple[int, int]) -> None:
    """Send stdout and stderr of Python and of native code to files, as a UTF-8 terminal would."""
    devnull = os.open(os.devnull, os.O_RDONLY)
    for target, source in enumerate((devnull, *log_descriptors)):
        os.dup2(source, target)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout.reconfigure(encoding="utf-8", errors="strict")  # type: ignore[union-attr]
    sys.stderr.reconfigure(encoding="utf-8", errors="backslashreplace")  # type: ignore[union-attr]

    # The parent sends it before it ends a case that hangs.
    faulthandler.register(signal.SIGUSR1, file=2, all_threads=True)


def _limit() -> None:
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmData:"):
            used = int(line.split()[1]) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (used + MAX_GROWTH_BYTES,) * 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MAX_FILE_BYTES,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _enter(root: Path) -> None:
    home = root / "home"
    (root / "tmp").mkdir()
    os.environ.update(HOME=str(home), TMPDIR=str(root / "tmp"))
    tempfile.tempdir = None
    os.chdir(home / "project")


def _stop_long_work(reporter: Reporter) -> None:
    """Replace the functions that start clusters or train for long."""
    from dist_ft.runs import watch_run
    from dist_ft.training import trainer

    for module_name, name in STOPPED:
        module = importlib.import_module(module_name)
        if not callable(getattr(module, name)):
            raise TypeError(f"{module_name}.{name} is no function; correct STOPPED")

        def stopped(*_args: Any, place: str = f"{module_name}.{name}", **_kwargs: Any) -> NoReturn:
            reporter.guard(place)

        setattr(module, name, stopped)

    create = trainer.Trainer.__init__

    def created(
        self: Any,
        run: Any,
        components: Any,
        context: Any,
        progress: Any,
        total_steps: int,
        *rest: Any,
    ) -> None:
        if total_steps - progress.step > MAX_STEPS:
            reporter.guard("training of many steps")
        create(self, run, components, context, progress, total_steps, *rest)

    trainer.Trainer.__init__ = created  # type: ignore[method-assign]
    # A run that is still in progress is followed for minutes.
    watch_run.watch.__defaults__ = (0.05, 0.2)  # type: ignore[attr-defined]


def _install_guard(root: Path, reporter: Reporter) -> None:
    """Install the audit hook; it cannot be removed from this process."""
    # Libraries read the place of their caches when they were imported.
    inside = tuple(f"{os.path.realpath(path)}/" for path in (root, os.environ["HF_HOME"]))
    state = threading.local()

    def check_path(path: Any) -> None:
        if isinstance(path, int) or path is None:
            return
        text = os.fsdecode(path)
        resolved = os.path.join(
            os.path.realpath(os.path.dirname(text) or "."), os.path.basename(text)
        )
        if f"{resolved}/".startswith(inside) or resolved.startswith(HARMLESS):
            return
        reporter.add("outside", resolved)
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), text)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        # What the checks do themselves are events too.
        if getattr(state, "is_busy", False):
            return
        state.is_busy = True
        try:
            _check_event(event, arguments, check_path, reporter)
        finally:
            state.is_busy = False

    sys.addaudithook(hook)


def _check_event(
    event: str, arguments: tuple[Any, ...], check_path: Callable[[Any], None], reporter: Reporter
) -> None:
    if event == "open":
        path, _, flags = arguments
        if isinstance(flags, int) and flags & WRITES:
            check_path(path)
    elif event in PATHS_WRITTEN:
        for path in arguments[: PATHS_WRITTEN[event]]:
            check_path(path)
    elif event == "subprocess.Popen":
        program = os.path.basename(os.fsdecode(arguments[0]))
        if program not in PROGRAMS:
            reporter.guard(f"starts {program}")
    elif event in STARTS:
        # subprocess calls them too, for programs that were allowed above.
        if event not in ("os.fork", "os.posix_spawn"):
            reporter.guard(event)
    elif event in KILLS and arguments[1] != 0:
        # Signal 0 only checks whether a process exists.
        reporter.guard(event)
    elif event in ("socket.connect", "socket.sendto"):
        _refuse_connection(arguments[1])
    elif event in NAME_LOOKUPS and arguments[0] not in OWN_NAMES:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")


def _refuse_connection(address: Any) -> NoReturn:
    """Raise what a machine without network does; a port of this machine is closed."""
    host = address[0] if isinstance(address, tuple) else ""
    if isinstance(host, str) and host.startswith(("127.", "::1", "localhost")):
        raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
    raise OSError(errno.ENETUNREACH, os.strerror(errno.ENETUNREACH))
