"""Builds the next steps in a background thread while the current one is trained."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

CLOSE_S = 1.0
"""How long the end of an iteration waits for the thread."""

T = TypeVar("T")


def build_ahead(
    build: Callable[[int], T], steps: range, num_ahead: int
) -> Generator[T, None, None]:
    """Yield `build(step)` of each step, in order; errors of the thread are raised here.

    `num_ahead`: steps that are built before they are consumed.
    """
    # one thread, so that steps are built in order
    pool = ThreadPoolExecutor(1, thread_name_prefix="dist_ft-loader")
    pending: deque[Future[T]] = deque()
    try:
        for step in steps:
            pending.append(pool.submit(build, step))
            if len(pending) > num_ahead:
                # raises here what the thread raised
                yield pending.popleft().result()

        while pending:
            yield pending.popleft().result()
    finally:
        # Also runs when the consumer stops early. A thread that waits for a block to be tokenized
        # cannot be interrupted, so waiting for it has a limit; closing the store ends it.
        pool.shutdown(wait=False, cancel_futures=True)
        running = [future for future in pending if not future.cancelled()]
        is_busy = bool(wait(running, CLOSE_S).not_done)
        pool.shutdown(wait=not is_busy)
