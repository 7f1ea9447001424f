"""A process that trains, beside the Ray worker that looks after it: imported in advance, told by a pipe what to do.

The Ray worker itself never imports torch: it sees hangs, crashes and kills from outside, and a spare process takes over
at once, with everything imported. In the process a run is what it is under torchrun: `runtime.local` finds its peers in
the environment. The pipe carries pickles between two processes of ours; nothing from outside.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import logging
import math
import os
import signal
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

from dist_ft.config.schema import RunConfig
from dist_ft.core.errors import DistFtError, explain_library_error
from dist_ft.runtime.elastic import process_keeper
from dist_ft.training.callbacks import Callback, CallbackList
from dist_ft.training.console import Console
from dist_ft.training.run_context import RunContext

PEER_GONE = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "ncclRemoteError",
    "Connection refused",
    "Timed out waiting",
    "recvValue failed",
    "DistNetworkError",
    "failed to recv",
    "unexpected EOF",
)
_PR_SET_PDEATHSIG = 1


class Process:
    """The worker's side."""

    def __init__(self, kept: process_keeper.Kept) -> None:
        """Take a process that waits: use `start` or `claim`."""
        self._kept, self._pipe = kept, kept.pipe

    @classmethod
    def start(cls, config: RunConfig, modules: Sequence[str] = (), spares: str = "") -> Process:
        """Start a process that imports what training needs (`modules`: what it needed before), and waits.

        Raises OSError if the system lets none start.
        """
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        }
        command = [sys.executable, "-m", "dist_ft.runtime.elastic.worker_process"]
        process = cls(process_keeper.start(command, environment, _name(spares)))
        process._send((config.model_dump(mode="json"), os.getcwd(), tuple(modules)))
        process._kept.ready()
        return process

    @classmethod
    def claim(cls, spares: str) -> Process | None:
        """Return a process that a lost worker with the same `spares` (run and node) and GPUs has left, or None."""
        kept = process_keeper.claim(_name(spares))
        if kept is None:
            return None
        kept.ready()
        return cls(kept)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._kept.pid

    def begin(self, environment: Mapping[str, str], after: str) -> None:
        """Let it train, and end with this worker; `after`: why the generation before ended."""
        self._kept.begun()
        self._send((dict(environment), after))

    def stop(self) -> None:
        """Ask it to save and leave."""
        self._send("stop")

    def save(self, number: int) -> None:
        """Ask it to save and train on; it answers ("saved", number) when that is over."""
        self._send(number)

    def _send(self, message: Any) -> None:
        with contextlib.suppress(OSError):  # it is gone; `messages` tells
            self._pipe.send(message)

    def messages(self, timeout_s: float) -> list[tuple[Any, ...]]:
        """Return what it has said since the last call, waiting a while for one; the last is ("gone", exit code)."""
        found: list[tuple[Any, ...]] = []
        try:
            while self._pipe.poll(0 if found else timeout_s):
                found.append(self._pipe.recv())
        except (EOFError, OSError):
            found.append(("gone", self._kept.wait()))
        return found

    def end(self) -> None:
        """Kill it, whatever it does, and wait until it is gone."""
        self._kept.end()


def _name(spares: str) -> str:
    """Return what says which processes a worker may claim: imported anew they would see the same GPUs."""
    return repr(
        (
            spares,
            sys.executable,
            sorted(item for item in os.environ.items() if "VISIBLE" in item[0]),
        )
    )


class _Child:
    """The child's side of the pipe."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._lock = threading.Lock()
        self.asked_to_stop = threading.Event()
        self._wish = self._taken = self._answered = 0

    def say(self, *message: Any) -> None:
        """Send a message; a parent that is gone wants none."""
        with self._lock, contextlib.suppress(OSError):
            self._pipe.send(message)

    def listen(self) -> None:
        """Take wishes until the parent is gone, and this process with it."""
        with contextlib.suppress(EOFError, OSError):
            while True:
                wish = self._pipe.recv()
                if wish == "stop":
                    self.asked_to_stop.set()
                else:
                    self._wish = wish
        os._exit(1)

    def should_save(self) -> bool:
        """Tell whether there is a wish to save that is not answered yet."""
        self._taken = self._wish
        return self._taken > self._answered

    def saved(self) -> None:
        """Answer what `should_save` told of last."""
        self._answered = self._taken
        self.say("saved", self._taken)


class _PipeConsole(Console):
    def __init__(self, child: _Child) -> None:
        super().__init__()
        self._child = child

    def say(self, text: str) -> None:
        """Send `text` to be printed on lines of its own."""
        self._child.say("line", "say", text)

    def progress(self, text: str) -> None:
        """Send `text` to be shown as the current progress line."""
        self._child.say("line", "progress", text)


class _PipeCallback(Callback):
    """Sends what happens in training to the parent."""

    def __init__(self, child: _Child) -> None:
        self._child = child
        self._num_progress = 0

    def on_progress(self) -> None:
        """Report once that the first step is done: a spare that is prepared from now on does not delay it."""
        self._num_progress += 1
        if self._num_progress == 2:
            self._child.say("begun", tuple(sys.modules))

    def on_metrics(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        """Send the finite values."""
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        self._child.say("measured", step, kind, finite)

    def on_checkpoint_committed(self, url: str, metrics: Mapping[str, float]) -> None:
        """Send a checkpoint in storage."""
        self._child.say("committed", url, dict(metrics))

    def on_local_checkpoint_committed(self, step: int) -> None:
        """Send that the run made progress."""
        self._child.say("progressed")


class _PipeLog(logging.Handler):
    def __init__(self, child: _Child) -> None:
        super().__init__()
        self._child = child

    def emit(self, record: logging.LogRecord) -> None:
        """Send the formatted record (`logs.setup_logging` gives the format, which removes credentials)."""
        try:
            self._child.say("line", "log", self.format(record))
        except Exception:
            self.handleError(record)


def main() -> None:
    """Import, wait, train, tell how it ended."""
    _die_with_parent()
    descriptor = int(sys.argv[1])
    os.set_inheritable(descriptor, False)
    child = _Child(pipe := Connection(descriptor))
    try:
        document, folder, modules = pipe.recv()
        if os.path.isdir(folder):
            os.chdir(folder)
        config = RunConfig.model_validate(document)
        broken = _import(config, modules)
        environment, after = pipe.recv()
    except EOFError:
        return  # nobody needs it any more
    os.environ.update(environment)
    threading.Thread(target=child.listen, name="parent", daemon=True).start()
    child.say(*(broken or _train(config, child, after)))
    logging.shutdown()
    sys.stdout.flush()
    os._exit(0)  # broken process groups may hold their threads for long


def _import(config: RunConfig, modules: Sequence[str]) -> tuple[Any, ...] | None:
    """Import what a run of this kind takes seconds to; return the last message if that fails."""
    try:
        from dist_ft.engine import deepspeed_engine
        from dist_ft.runtime.bootstrap import training_run  # noqa: F401
        from dist_ft.storage.filesystem import warm

        deepspeed_engine.import_deepspeed(config.cluster.gpus_per_worker > 0)
        warm(config.run_url)
    except Exception as error:
        return _failed(error)
    for name in modules:
        with contextlib.suppress(Exception):  # what can not be had alone comes when it is needed
            importlib.import_module(name)
    return None


def _train(config: RunConfig, child: _Child, after: str) -> tuple[Any, ...]:
    """Return the last message: ("result", Result), ("error", DistFtError) or ("failed", is it a peer's, text)."""
    from dist_ft.runtime import local

    log_lines = (
        _PipeLog(child) if config.log.level != "debug" else None
    )  # then Ray forwards all there is
    context = RunContext(
        console=_PipeConsole(child),
        callbacks=CallbackList([_PipeCallback(child)]),
        should_stop=child.asked_to_stop.is_set,
        should_save=child.should_save,
        on_requested_save_end=child.saved,
        log_handler=log_lines,
        previous_end=after,
    )
    try:
        return "result", local.run(config, context)
    except DistFtError as error:
        return "error", error
    except BaseException as error:
        return _failed(error)


def _failed(error: BaseException) -> tuple[Any, ...]:
    traceback.print_exc()
    text = str(explain_library_error(error) or (str(error).strip().splitlines() or [type(error).__name__])[-1])
    whole = f"{type(error).__name__}: {error}"
    return "failed", any(sign in whole for sign in PEER_GONE), text


def _die_with_parent() -> None:
    """Ask the kernel to kill this process with its parent, even where it can not listen (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    main()
