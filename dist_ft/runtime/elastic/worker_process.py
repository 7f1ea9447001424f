"""A training process next to its Ray worker: imports in advance, then waits to start.

The Ray worker itself never imports torch: it notices hangs, crashes and kills from outside, and a
spare process with all imports done takes over at once. In the process, a run is what it is under
torchrun: `runtime.local` finds its peers in the environment. The pipe carries pickles between two
processes of the same user, nothing from outside.
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
import time
import traceback
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection

from dist_ft.config.schema import RunConfig
from dist_ft.config.task_facts import allow_task
from dist_ft.core import fault_injection
from dist_ft.core.errors import DistFtError, explain_library_error
from dist_ft.core.output import redact_output
from dist_ft.core.private_folders import keep_compiled_code_private
from dist_ft.core.redaction import redact
from dist_ft.runtime.elastic import peer_loss, process_keeper
from dist_ft.runtime.elastic.messages import (
    CommittedCheckpoint,
    FirstStepsDone,
    LastMessage,
    LocalCheckpointCommitted,
    MetricsLine,
    OutputLine,
    ProcessExited,
    ProgressSign,
    SaveDone,
    SaveRequest,
    Setup,
    StartTraining,
    StopRequest,
    TrainingCrashed,
    TrainingFailed,
    TrainingFinished,
    WorkerMessage,
)
from dist_ft.training.callbacks import Callback, CallbackList
from dist_ft.training.console import Console
from dist_ft.training.run_context import RunContext

PROGRESS_SIGN_S = 5.0
"""Seconds between signs of progress that are sent to the supervisor."""
_PR_SET_PDEATHSIG = 1


class TrainingProcess:
    """A training process as its worker sees it."""

    def __init__(self, process: process_keeper.KeptProcess) -> None:
        """Wrap a process that waits: use `start` or `claim`."""
        self._process, self._pipe = process, process.pipe

    @classmethod
    def start(
        cls, config: RunConfig, modules: Sequence[str] = (), spare_name: str = ""
    ) -> TrainingProcess:
        """Start a process that imports what training needs, and waits.

        Args:
            config: the run.
            modules: names of further modules to import, as an earlier process of the run needed
                them.
            spare_name: name under which a later worker may claim it.

        Raises:
            OSError: the system starts no process.
        """
        # Ray extends `sys.path` of its workers, which a new interpreter would not inherit.
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        }
        command = [sys.executable, "-m", "dist_ft.runtime.elastic.worker_process"]
        process = cls(process_keeper.start(command, environment, _claim_name(spare_name)))

        # Claimable only with its setup: the next worker sends none.
        process._send(Setup(config.model_dump(mode="json"), os.getcwd(), tuple(modules)))
        process._process.allow_claim()
        return process

    @classmethod
    def claim(cls, spare_name: str) -> TrainingProcess | None:
        """Return a process that a lost worker with this `spare_name` and GPUs left, or None."""
        process = process_keeper.claim(_claim_name(spare_name))
        if process is None:
            return None
        process.allow_claim()
        return cls(process)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def start_training(self, environment: Mapping[str, str], reason: str) -> None:
        """Let it train and end with this worker; `reason`: why the generation before ended."""
        # First: a process that trains for a lost worker must not be claimed.
        self._process.bind_to_worker()
        self._send(StartTraining(dict(environment), reason))

    def request_stop(self) -> None:
        """Have it save and exit."""
        self._send(StopRequest())

    def request_save(self, number: int) -> None:
        """Have it save and continue training; it answers `SaveDone(number)` after that."""
        self._send(SaveRequest(number))

    def receive(self, timeout_s: float) -> list[WorkerMessage]:
        """Return its messages since the last call, waiting up to `timeout_s` for one.

        Once it has ended, the last one is `ProcessExited`.
        """
        messages: list[WorkerMessage] = []
        try:
            # Wait for the first one only, then take what is there.
            while self._pipe.poll(0 if messages else timeout_s):
                messages.append(self._pipe.recv())
        except (EOFError, OSError):
            messages.append(ProcessExited(self._process.wait()))
        return messages

    def kill(self) -> None:
        """Kill it, whatever it does, and wait until it has ended."""
        self._process.kill()

    def _send(self, message: Setup | StartTraining | StopRequest | SaveRequest) -> None:
        with contextlib.suppress(OSError):  # it has ended; `receive` reports that
            self._pipe.send(message)


def _claim_name(spare_name: str) -> str:
    """Return a name that only workers with the same interpreter and GPUs share."""
    # CUDA reads these once, when it starts: a process cannot change to other GPUs later.
    gpu_variables = sorted(item for item in os.environ.items() if "VISIBLE" in item[0])
    return repr((spare_name, sys.executable, gpu_variables))


class _ParentPipe:
    """The training process's end of the pipe to its supervisor."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._lock = threading.Lock()  # training, its writers and log handlers all send
        self.stop_requested = threading.Event()

        # Numbers of save requests: the latest, the one that the next save answers, and the last
        # answered.
        self._requested_number = 0
        self._pending_number = 0
        self._done_number = 0

    def send(self, message: WorkerMessage) -> None:
        """Send a message; does nothing if the parent has ended."""
        with self._lock, contextlib.suppress(OSError):
            self._pipe.send(message)

    def listen(self) -> None:
        """Receive requests until the parent ends, then end this process."""
        with contextlib.suppress(EOFError, OSError):
            while True:
                message = self._pipe.recv()
                if isinstance(message, StopRequest):
                    self.stop_requested.set()
                else:
                    self._requested_number = message.number

        # The training thread may never return from a collective call whose peers are gone.
        os._exit(1)

    def should_save(self) -> bool:
        """Return whether a save request is open."""
        # A request that arrives during the save is not answered by it, so remember the number.
        self._pending_number = self._requested_number
        return self._pending_number > self._done_number

    def on_save_end(self) -> None:
        """Answer the request that `should_save` saw last."""
        self._done_number = self._pending_number
        self.send(SaveDone(self._pending_number))


class _PipeConsole(Console):
    def __init__(self, parent: _ParentPipe) -> None:
        super().__init__()
        self._parent = parent

    def print(self, text: str) -> None:
        """Send `text` to be printed on lines of its own."""
        self._parent.send(OutputLine("message", text))

    def show_progress(self, text: str) -> None:
        """Send `text` to be shown as the current progress line."""
        self._parent.send(OutputLine("progress", text))


class _PipeCallback(Callback):
    """Sends what happens in training to the supervisor."""

    def __init__(self, parent: _ParentPipe) -> None:
        self._parent = parent
        self._num_progress = 0
        self._step: int | None = None
        self._sent_sign_s = float("-inf")

    def on_step_end(self, step: int, loss: float) -> None:
        """Note the step, which the next sign of progress names."""
        self._step = step

    def on_progress(self) -> None:
        """Report once that the first step is done, so that a spare may start."""
        # Each call comes before its step or batch, so the second one means that the first is done.
        self._num_progress += 1
        if self._num_progress == 2:
            self._parent.send(FirstStepsDone(tuple(sys.modules)))

        now_s = time.monotonic()
        if now_s - self._sent_sign_s >= PROGRESS_SIGN_S:
            self._sent_sign_s = now_s
            self._parent.send(ProgressSign(self._step))

    def on_metrics(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        """Send the finite values."""
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        self._parent.send(MetricsLine(step, kind, finite))

    def on_checkpoint_committed(self, url: str, metrics: Mapping[str, float]) -> None:
        """Send a checkpoint in storage."""
        self._parent.send(CommittedCheckpoint(url, dict(metrics)))

    def on_local_checkpoint_committed(self, step: int) -> None:
        """Send that the run made progress."""
        self._parent.send(LocalCheckpointCommitted())


class _PipeLog(logging.Handler):
    def __init__(self, parent: _ParentPipe) -> None:
        super().__init__()
        self._parent = parent

    def emit(self, record: logging.LogRecord) -> None:
        """Send the record; the format of `logs.setup_logging` removes credentials."""
        try:
            self._parent.send(OutputLine("log", self.format(record)))
        except Exception:
            self.handleError(record)


def main() -> None:
    """Import, wait, train, and report how training ended."""
    keep_compiled_code_private()
    redact_output()  # of libraries too, and of tracebacks

    # The keeper kills this process with its worker; if the keeper is killed, the kernel does.
    _die_with_parent()

    # Data loaders and tokenizers start processes, which must not hold the pipe open.
    descriptor = int(sys.argv[1])
    os.set_inheritable(descriptor, False)
    pipe = Connection(descriptor)
    parent = _ParentPipe(pipe)

    last_message: LastMessage
    try:
        last_message = _wait_and_train(pipe, parent)
    except EOFError:
        return  # it is no longer needed
    except DistFtError as error:
        last_message = TrainingFailed(error)
    except (Exception, SystemExit) as error:
        # Uncaught, it would end this process with exit code 1, which stands for a hang.
        last_message = _failed_before_training(error)
    parent.send(last_message)

    logging.shutdown()
    sys.stdout.flush()
    os._exit(0)  # threads of broken process groups may run for long


def _wait_and_train(pipe: Connection, parent: _ParentPipe) -> LastMessage:
    """Import, wait for the start, train; raises EOFError if the process is no longer needed."""
    setup: Setup = pipe.recv()
    if os.path.isdir(setup.folder):
        os.chdir(setup.folder)
    config = RunConfig.model_validate(setup.config)
    allow_task(config.task.name)  # the driver allowed it

    # A spare waits in the second `recv` for hours, with everything imported. A failure is read only
    # when training starts.
    import_failure = _import(config, setup.modules)
    start: StartTraining = pipe.recv()

    # The thread only now: two readers of one pipe would take each other's messages.
    os.environ.update(start.environment)
    threading.Thread(target=parent.listen, name="parent", daemon=True).start()
    return import_failure or _train(config, parent, start.reason)


def _import(config: RunConfig, modules: Sequence[str]) -> TrainingCrashed | None:
    """Import what takes a run of this kind seconds; return the last message if that fails."""
    try:
        from dist_ft.engine import deepspeed_engine
        from dist_ft.runtime.bootstrap import training_run  # noqa: F401
        from dist_ft.storage.filesystem import warm

        deepspeed_engine.import_deepspeed(config.cluster.gpus_per_worker > 0)
        warm(config.run_url)  # imports what this storage needs
    except Exception as error:
        return _crashed(error)

    for name in modules:
        with contextlib.suppress(Exception):  # one that cannot be imported alone is when needed
            importlib.import_module(name)
    return None


def _train(config: RunConfig, parent: _ParentPipe, reason: str) -> LastMessage:
    from dist_ft.runtime import local

    # At log level debug Ray forwards everything that is written to stderr.
    log_handler = _PipeLog(parent) if config.log.level != "debug" else None
    context = RunContext(
        console=_PipeConsole(parent),
        callbacks=CallbackList([_PipeCallback(parent)]),
        should_stop=parent.stop_requested.is_set,
        should_save=parent.should_save,
        on_requested_save_end=parent.on_save_end,
        log_handler=log_handler,
        previous_end=reason,
    )
    try:
        return TrainingFinished(local.run(config, context))
    except DistFtError as error:
        return TrainingFailed(error)
    except BaseException as error:
        # `SystemExit` and `KeyboardInterrupt` too: an end without a message looks like a hang.
        return _crashed(error)


def _failed_before_training(error: BaseException) -> TrainingCrashed:
    traceback.print_exc()

    # All lines in one: the last line of an invalid config is only a link to the documentation.
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return TrainingCrashed(is_peer_loss=False, text=redact(f"failed before training: {text}"))


def _crashed(error: BaseException) -> TrainingCrashed:
    # The message has one line; the stack is for the log of the worker.
    traceback.print_exc()
    full_text = f"{type(error).__name__}: {error}"
    is_peer_loss = peer_loss.reports_peer_loss(full_text)
    if is_peer_loss:
        # Where NCCL's watchdog would end this process instead.
        fault_injection.hit("worker.peer_lost", int(os.environ.get("RANK", "0")))

    explained = explain_library_error(error)
    if explained is not None:
        return TrainingCrashed(is_peer_loss, str(explained))

    lines = str(error).strip().splitlines() or [type(error).__name__]
    return TrainingCrashed(is_peer_loss, redact(lines[-1]))


def _die_with_parent() -> None:
    """Have the kernel kill this process with its parent, even a stopped one (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    main()
