"""What a run gets from the process around it. Light: no torch, so that a driver starts fast."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from dist_ft.training.callbacks import Callback, CallbackList
from dist_ft.training.console import Console


@dataclass(frozen=True)
class RunContext:
    """Output, callbacks and outside requests of a run in one process.

    Attributes:
        console: where rank 0 prints.
        callbacks: what is called when something happens in training.
        should_stop: called on every rank once a step; if any rank returns True, all save after that
            step and stop.
        should_save: called on every rank once a step, True until `on_requested_save_end`; if any
            rank returns True, all save after that step and wait for the save.
        on_requested_save_end: called on every rank when that save has ended; if it succeeded,
            `Callback.on_checkpoint_committed` was called before.
        log_handler: also gets the log lines of this worker; default: they go to stderr only.
        previous_end: why the previous attempt ended; "" if that is not known.
        on_hang: called with a line before the watchdog ends this process; must return within
            seconds.
    """

    console: Console = field(default_factory=Console)
    callbacks: CallbackList = field(default_factory=CallbackList)
    should_stop: Callable[[], bool] = lambda: False
    should_save: Callable[[], bool] = lambda: False
    on_requested_save_end: Callable[[], None] = lambda: None
    log_handler: logging.Handler | None = None
    previous_end: str = ""
    on_hang: Callable[[str], None] = lambda text: None

    def with_callback(self, callback: Callback) -> RunContext:
        """Return a copy that calls `callback` before the others."""
        return replace(self, callbacks=CallbackList([callback, *self.callbacks]))
