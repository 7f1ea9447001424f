"""Retries of calls that may fail for a while: with jitter, up to a limit and a deadline.

Within `retry_limit(..., timeout_s=...)` a host that does not answer in time is given up and not
contacted again.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TypeVar

from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception,
    stop_after_attempt,
    stop_after_delay,
    wait_random_exponential,
)

from dist_ft.core.logs import redact
from dist_ft.storage.error_messages import NoAnswerError, is_transient

log = logging.getLogger("dist_ft.storage.filesystem")
T = TypeVar("T")

DEFAULT_ATTEMPTS = 8
"""Attempts of a call: with the waits between them they bridge an outage of 30 s on average."""
CRITICAL_ATTEMPTS = 20
"""Attempts for data that must not be lost: they bridge an outage of some minutes."""
DEADLINE_S = 300.0
"""No attempt starts later than this after the first."""
MAX_WAIT_S = 30.0
"""Longest wait between two attempts."""
FIRST_LOGGED_ATTEMPT = 3
"""Failed attempts are logged from this one on: someone may be waiting by then."""


@dataclass(frozen=True)
class _RetryLimit:
    """How long to retry.

    Attributes:
        max_attempts: number of attempts, the first included.
        timeout_s: a call without an answer for this long is given up; None: the client's own
            timeouts apply.
        silent_hosts: hosts that gave no answer in time; they are not contacted again.
    """

    max_attempts: int
    timeout_s: float | None = None
    silent_hosts: set[str] = field(default_factory=set)


# Per context, not global: the time ledger gives up at once while a save in another thread of the
# process retries for minutes.
_limit: ContextVar[_RetryLimit | None] = ContextVar("retry_limit", default=None)


def _current_limit() -> _RetryLimit:
    return _limit.get() or _RetryLimit(DEFAULT_ATTEMPTS)


@contextmanager
def retry_limit(max_attempts: int, timeout_s: float | None = None) -> Iterator[None]:
    """Within: give up after `max_attempts`, and on a host that does not answer within `timeout_s`.

    Use few attempts where a user waits, as in `dist-ft check`, and CRITICAL_ATTEMPTS for data that
    would be lost.
    """
    # A new set of silent hosts each time: a host may have recovered since the last one.
    token = _limit.set(_RetryLimit(max_attempts, timeout_s))
    try:
        yield
    finally:
        _limit.reset(token)


def max_attempts() -> int:
    """Return how many attempts a call has in this context."""
    return _current_limit().max_attempts


def with_retries(url: str, call: Callable[[], T], can_hang: bool = True) -> T:
    """Return `call()`, which accesses `url`, with retries after transient errors.

    Raises the error of the last attempt.

    `can_hang=False`: the call always returns soon (a local disk), so no timeout is needed.
    """
    for attempt in _retrying(url):
        with attempt:
            if not can_hang:
                return call()
            return _with_timeout(url, call)

    # The type checker does not know that tenacity's loop ends with a return or an error.
    raise AssertionError("tenacity raises the last error")


def _retrying(url: str) -> Retrying:
    def log_failure(state: RetryCallState) -> None:
        if state.attempt_number < FIRST_LOGGED_ATTEMPT:
            return

        error: BaseException | None = None
        if state.outcome is not None:
            error = state.outcome.exception()
        # The type only: the text may be long, and it is in the final error.
        log.warning(
            "%s: attempt %d failed (%s), retrying",
            redact(url),
            state.attempt_number,
            type(error).__name__,
        )

    # Each wait is drawn from 0 to a limit that grows: ranks that failed together in an outage must
    # not all return at the same moment.
    return Retrying(
        stop=stop_after_attempt(max_attempts()) | stop_after_delay(DEADLINE_S),
        wait=wait_random_exponential(multiplier=0.5, max=MAX_WAIT_S),
        retry=retry_if_exception(is_transient),
        before_sleep=log_failure,
        reraise=True,
    )


def _with_timeout(url: str, call: Callable[[], T]) -> T:
    """Return `call()`; with a timeout, a call that does not answer is abandoned in its thread."""
    limit = _current_limit()
    if limit.timeout_s is None:
        return call()

    # protocol://host or protocol://bucket
    host = "/".join(url.split("/")[:3])
    if host in limit.silent_hosts:
        raise NoAnswerError(f"{redact(host)} did not answer before")

    answer: Future[T] = Future()

    def run_call() -> None:
        try:
            answer.set_result(call())
        except BaseException as error:
            # Any error at all, or the caller would wait for the whole timeout.
            answer.set_exception(error)

    # A thread of its own rather than one of a pool: calls that never return would fill the pool. A
    # daemon does not keep the process from ending.
    threading.Thread(target=run_call, name="dist_ft-storage-call", daemon=True).start()
    if not wait([answer], limit.timeout_s).done:
        limit.silent_hosts.add(host)
        raise NoAnswerError(f"no answer within {limit.timeout_s:g} s")

    return answer.result()
