"""Watches a run from the process that was started, and sends notices about it.

On Ray that is the driver, else the process that trains. If that process is killed, nobody is left
to send a notice.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator

from dist_ft.checkpoint.attempt_records import read_attempts
from dist_ft.config.schema import RunConfig
from dist_ft.config.sections.log import NotifyEvent
from dist_ft.core.errors import DistFtError, Interrupted, LimitReached, StorageError
from dist_ft.storage.filesystem import Store
from dist_ft.storage.retry import retry_limit
from dist_ft.training.callbacks import Callback
from dist_ft.training.console import format_duration
from dist_ft.training.notify.notice import make_notice
from dist_ft.training.notify.notifier import Notifier
from dist_ft.training.notify.rules import ProgressWatch, RestartCounter
from dist_ft.training.result import Result

log = logging.getLogger("dist_ft.notify")
STORAGE_TIMEOUT_S = 5.0
"""How long earlier attempts may take to read: notices do not delay a start."""
MAX_ATTEMPTS = 100
"""Earlier attempts that are looked at."""
LAST_WORDS_S = 4.0
"""How long a process that is about to be ended by its watchdog waits for a notice; less than the
watchdog's second timer leaves it."""


class RunMonitor:
    """Watches one run; its methods never raise and never wait for a delivery, except `close`."""

    def __init__(self, config: RunConfig, notifier: Notifier) -> None:
        """Watch from now on; call `start` once."""
        section = config.log.notify
        self._config = config
        self._events = frozenset(section.events)
        self._notifier = notifier
        self._step: int | None = None
        self._ended = threading.Event()
        self._lock = threading.Lock()  # training, the driver's loop and the timer all report
        self._watch = ProgressWatch(section.no_progress_s, time.monotonic())
        self._restarts = RestartCounter(section.restarts, section.restarts_within_s)

    def start(self) -> None:
        """Count the failed attempts before this start, and start the timer."""
        if not self._notifier.has_channels:
            return

        section = self._config.log.notify
        failed_at = failed_attempts(self._config.run_url)
        now_s = time.time()
        recent = [at for at in failed_at if now_s - at <= section.restarts_within_s]

        # On the clock of this process. The latest of them is the restart that happens now.
        if recent:
            steady = [time.monotonic() - (now_s - at) for at in recent[:-1]]
            self._restarts = RestartCounter(section.restarts, section.restarts_within_s, steady)
            self.report_restart("the command was started again after a failed attempt")
        threading.Thread(target=self._run_timer, name="notify-timer", daemon=True).start()

    def report_progress(self, step: int | None = None) -> None:
        """Note a sign of progress, and the step if that is known."""
        with self._lock:
            self._watch.record(time.monotonic())
            if step is not None:
                self._step = step

    def report_restart(self, reason: str) -> None:
        """Note a restart after a failure."""
        with self._lock:
            num_restarts = self._restarts.add(time.monotonic())
        if num_restarts:
            within = format_duration(self._config.log.notify.restarts_within_s)
            self._send("restarts", f"{num_restarts} restarts within {within}; the latest: {reason}")

    def report_result(self, result: Result) -> None:
        """Note that the run is complete."""
        self._step = result.step
        loss = "" if result.loss is None else f", loss {result.loss:.4f}"
        self._send("end", f"complete: step {result.step} of {result.total_steps}{loss}")

    def report_error(self, error: BaseException) -> None:
        """Note how the run ended without a result."""
        if isinstance(error, Interrupted | LimitReached):
            self._send("end", str(error))
        elif isinstance(error, KeyboardInterrupt):
            self._send("end", "stopped by the user; saved checkpoints are kept")
        elif isinstance(error, DistFtError):
            self._send("give_up", str(error))
        else:
            self._send("give_up", f"ended by {type(error).__name__}: {error}")

    def report_hang(self, text: str) -> None:
        """Send a last notice before the watchdog ends this process; wait a moment for it."""
        self._send("give_up", text)
        self._notifier.close(LAST_WORDS_S)

    def close(self) -> None:
        """Wait for the last notices, for a limited time."""
        self._ended.set()
        self._notifier.close()

    def _run_timer(self) -> None:
        interval_s = min(1.0, max(0.05, self._config.log.notify.no_progress_s / 10))
        while not self._ended.wait(interval_s):
            with self._lock:
                silent_s = self._watch.standstill_s(time.monotonic())
            if silent_s:
                last = "no step yet" if self._step is None else f"the last step was {self._step}"
                self._send("no_progress", f"no progress for {silent_s:.0f} s; {last}")

    def _send(self, event: NotifyEvent, message: str) -> None:
        if event not in self._events:
            return

        # Whatever goes wrong here must not end a run.
        try:
            config = self._config
            self._notifier.send(
                make_notice(event, config.run.name, config.run_url, self._step, message)
            )
        except Exception as error:
            log.warning("a notice could not be made (%s): %s", event, type(error).__name__)


class MonitorCallback(Callback):
    """Reports the progress of training in this process to a monitor."""

    def __init__(self, monitor: RunMonitor) -> None:
        self._monitor = monitor

    def on_step_end(self, step: int, loss: float) -> None:
        """Report the step."""
        self._monitor.report_progress(step)

    def on_progress(self) -> None:
        """Report a sign of progress."""
        self._monitor.report_progress()


@contextlib.contextmanager
def monitor_run(config: RunConfig) -> Iterator[RunMonitor]:
    """Yield the monitor of a run; report an error that ends it. The caller reports the result."""
    monitor = RunMonitor(config, Notifier.from_config(config))
    monitor.start()
    try:
        yield monitor
    except BaseException as error:
        monitor.report_error(error)
        raise
    finally:
        monitor.close()


def failed_attempts(run_url: str) -> list[float]:
    """Return when the attempts started (time.time) that did not end as planned, oldest first."""
    # Only a count for notices: what cannot be read is not counted.
    try:
        with retry_limit(1, STORAGE_TIMEOUT_S):
            attempts = read_attempts(Store(run_url), MAX_ATTEMPTS)
    except StorageError:
        return []

    started = [attempt.started_s for attempt in attempts if not attempt.has_ended]
    return sorted(at_s for at_s in started if at_s is not None)
