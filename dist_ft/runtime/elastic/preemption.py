"""Saves when it is known that workers will end: a node is to be taken away, or the run takes more nodes.

Lives in Ray Train's controller, which learns of both first, and asks the relay. Guarantees: a node that was announced
costs no step from before the notice; before a resize the run has saved, or the reason why not was logged. Never raises:
Ray would take it for a failure of the run.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

log = logging.getLogger("dist_ft.preemption")
UNKNOWN_S = 120.0
"""So long Ray Train leaves workers on a node that goes without saying when."""
LEAST_S = 3.0
"""Nearer to its end nothing is begun any more."""
MOST_WAIT_S = 600.0
"""So long a resize waits for the save before it."""
LOOK_S = 0.2


class Announced(Protocol):
    """What is known of nodes that go: the ranks of our workers on each; when the first goes (None: nobody said)."""

    @property
    def preempted_node_to_ranks(self) -> Mapping[str, Sequence[int]]: ...  # noqa: D102
    @property
    def deadline_ms(self) -> float | None: ...  # noqa: D102


class Saves:
    """Asks for them. `relay` returns the relay of the run, its calls waited for."""

    def __init__(self, relay: Callable[[], Any]) -> None:
        self._relay = relay
        self._nodes: frozenset[str] = frozenset()
        self._first_at = self._asked_at = 0.0
        self._number = 0

    def nodes_go(self, info: Announced, now: float) -> None:
        """Save at once, and again as time runs out: training goes on until the nodes are gone.

        Called again and again until they are gone; `now` is on the clock of the deadline (time.time).
        """
        nodes = info.preempted_node_to_ranks
        known, self._nodes = self._nodes, frozenset(nodes)
        news = bool(self._nodes - known)
        if news:
            self._first_at = now
        ends_at = (
            self._first_at + UNKNOWN_S if info.deadline_ms is None else info.deadline_ms / 1000
        )
        if not news and not is_due(now, self._asked_at, ends_at):
            return
        with _told():
            relay = self._relay()
            if not news and not relay.is_saved(self._number):
                return
            self._asked_at = now
            if news:
                relay.going(describe(nodes))
                relay.put(
                    "log",
                    f"WARNING {describe(nodes)} will be taken away in {max(0.0, ends_at - now):.0f} s: "
                    "saving now, training goes on",
                )
            self._number = relay.save()

    def before_resize(self) -> None:
        """Save, and wait for it: the workers are about to end."""
        with _told():
            relay, until = self._relay(), time.monotonic() + MOST_WAIT_S
            relay.put("log", "INFO the number of workers is about to change: saving first")
            number = relay.save()
            while not relay.is_saved(number) and time.monotonic() < until:
                time.sleep(LOOK_S)


@contextlib.contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        log.warning("no save before workers end: %s: %s", type(error).__name__, error)


def is_due(now: float, asked_at: float, ends_at: float) -> bool:
    """Tell whether to save again before workers end: when half of the time left at the last wish is over. Pure."""
    return (asked_at + ends_at) / 2 <= now <= ends_at - LEAST_S


def describe(nodes: Mapping[str, Sequence[int]]) -> str:
    """Name nodes and the workers on them."""
    named = [
        f"node {name[:8]} (worker{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))})"
        for name, ranks in sorted(nodes.items())
    ]
    return ", ".join(named)
