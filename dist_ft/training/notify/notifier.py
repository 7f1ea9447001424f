"""Delivers notices in the background.

Guarantees: training never waits for a delivery and never fails by one; a notice is tried at most
`TRIES` times; each failure is one log line; closing waits at most as long as it is allowed.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Sequence

from dist_ft.config.schema import RunConfig
from dist_ft.training.notify.channels import (
    Channel,
    CommandChannel,
    DeliveryProblem,
    WebhookChannel,
)
from dist_ft.training.notify.notice import Notice

log = logging.getLogger("dist_ft.notify")
TRIES = 3
PAUSE_S = 1.0
"""Pause before the second attempt; it doubles for each further one."""
MAX_WAITING = 20
"""Notices of a channel that wait; further ones are dropped, and the log says so."""
CLOSE_S = 30.0
"""How long the end of a run waits for the last notices."""


class Notifier:
    """Sends notices to all channels, each of which has a thread."""

    def __init__(self, channels: Sequence[Channel], timeout_s: float) -> None:
        """Start the threads; `timeout_s`: limit of one attempt to deliver."""
        self._senders = [_Sender(channel, timeout_s) for channel in channels]

    @classmethod
    def from_config(cls, config: RunConfig) -> Notifier:
        """Return a notifier with the channels of `log.notify`; there may be none."""
        section = config.log.notify
        channels: list[Channel] = []
        if section.command:
            channels.append(CommandChannel(section.command))

        if section.webhook_env:
            url = os.environ.get(section.webhook_env, "")
            if url:
                channels.append(WebhookChannel(section.webhook_env, url))
            else:
                log.warning(
                    "log.notify.webhook_env=%s: this variable is not set here, so no notices go "
                    "to a webhook",
                    section.webhook_env,
                )

        return cls(channels, section.timeout_s)

    @property
    def has_channels(self) -> bool:
        """Whether notices go anywhere."""
        return bool(self._senders)

    def send(self, notice: Notice) -> None:
        """Queue a notice for all channels; does not wait."""
        for sender in self._senders:
            sender.add(notice)

    def close(self, wait_s: float = CLOSE_S) -> None:
        """Wait for the notices on their way, at most `wait_s` seconds; drop what is left."""
        until = time.monotonic() + wait_s
        for sender in self._senders:
            sender.request_end()
        for sender in self._senders:
            sender.join(until)


class _Sender:
    """The thread of one channel."""

    def __init__(self, channel: Channel, timeout_s: float) -> None:
        self._channel = channel
        self._timeout_s = timeout_s
        self._notices: queue.Queue[Notice | None] = queue.Queue()
        self._is_aborted = threading.Event()

        # A daemon: a server that never answers must not keep the process from ending.
        self._thread = threading.Thread(target=self._run, name="notify", daemon=True)
        self._thread.start()

    def add(self, notice: Notice) -> None:
        """Queue a notice, unless too many wait already."""
        if self._notices.qsize() >= MAX_WAITING:
            log.warning("%s: a notice was dropped (%s)", self._channel.name, notice.event)
            return
        self._notices.put(notice)

    def request_end(self) -> None:
        """Let the thread end after the notices that wait."""
        self._notices.put(None)

    def join(self, until_s: float) -> None:
        """Wait for the thread until then (time.monotonic), and abort what it does after that."""
        self._thread.join(max(0.0, until_s - time.monotonic()))
        if self._thread.is_alive():
            log.warning("%s: a notice was not delivered in time", self._channel.name)
            self._is_aborted.set()
            self._channel.abort()

    def _run(self) -> None:
        while True:
            notice = self._notices.get()
            if notice is None or self._is_aborted.is_set():
                return

            problem = self._deliver(notice)
            if problem is not None and not self._is_aborted.is_set():
                log.warning(
                    "%s: a notice was not delivered (%s): %s",
                    self._channel.name,
                    notice.event,
                    problem.text,
                )

    def _deliver(self, notice: Notice) -> DeliveryProblem | None:
        """Deliver a notice; return why the last attempt failed, or None."""
        pause_s = PAUSE_S
        for number in range(1, TRIES + 1):
            try:
                problem = self._channel.deliver(notice, self._timeout_s)
            except Exception as error:
                # Only its type: the text might hold the URL of a webhook.
                problem = DeliveryProblem(f"unexpected {type(error).__name__}", False)

            if problem is None or not problem.may_pass or number == TRIES:
                return problem
            if self._is_aborted.wait(pause_s):
                return problem
            pause_s *= 2
        return None
