"""Calls that may fail for a while: tried again with jitter, up to a number of tries and a deadline.

Where someone waits for the answer (`attempts`), a place that says nothing is given up, and not asked again.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

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
ATTEMPTS = 8
"""Tries of a call: with the waits between them, half a minute of outage on average."""
STUBBORN = 20
"""Tries of what must not be lost: some minutes."""
DEADLINE_S = 300.0
"""No further try begins after so long."""
LONGEST_WAIT_S = 30.0
TOLD_FROM = 3
"""From this try on a failure is told, for then someone may be waiting."""


@dataclass(frozen=True)
class _Patience:
    """How long to try.

    Attributes:
        tries: most tries.
        seconds: a call without an answer for so long is given up; None: the client's own time-outs decide.
        silent: places that gave no answer: they are not asked again.
    """

    tries: int
    seconds: float | None = None
    silent: set[str] = field(default_factory=set)


_patience: ContextVar[_Patience | None] = ContextVar("patience", default=None)


def _current() -> _Patience:
    return _patience.get() or _Patience(ATTEMPTS)


@contextmanager
def attempts(number: int, seconds: float | None = None) -> Iterator[None]:
    """Within: give up after so many tries, and on a place that does not answer within `seconds`.

    Few for questions whose asker waits, such as `dist-ft check`; STUBBORN for what would be lost.
    """
    before = _patience.set(_Patience(number, seconds))
    try:
        yield
    finally:
        _patience.reset(before)


def num_tries() -> int:
    """Return how often a call is tried here."""
    return _current().tries


def patiently(url: str, call: Callable[[], Any], bounded: bool = True) -> Any:
    """Return `call()`, which asks for `url`, tried again while that can help; raises what the last try raised.

    Not `bounded`: no call of it can be silent for long (a local disk).
    """
    for attempt in _retrying(url):
        with attempt:
            return _in_time(url, call) if bounded else call()


def _retrying(url: str) -> Retrying:
    def tell(state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        if state.attempt_number >= TOLD_FROM:
            log.warning(
                "%s: try %d failed (%s), trying again",
                redact(url),
                state.attempt_number,
                type(error).__name__,
            )

    return Retrying(
        stop=stop_after_attempt(_current().tries) | stop_after_delay(DEADLINE_S),
        wait=wait_random_exponential(multiplier=0.5, max=LONGEST_WAIT_S),
        retry=retry_if_exception(is_transient),
        before_sleep=tell,
        reraise=True,
    )


def _in_time(url: str, call: Callable[[], Any]) -> Any:
    """Return `call()`; where patience has an end, a call that gives no answer is left behind in its thread."""
    patience, place = _current(), "/".join(url.split("/")[:3])
    if patience.seconds is None:
        return call()
    if place in patience.silent:
        raise NoAnswerError(f"{redact(place)} gave no answer before")
    answer: Future[Any] = Future()

    def ask() -> None:
        try:
            answer.set_result(call())
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=ask, name="dist_ft-question", daemon=True).start()
    if not wait([answer], patience.seconds).done:
        patience.silent.add(place)
        raise NoAnswerError(f"no answer within {patience.seconds:g} s")
    return answer.result()
