"""Requests a save when workers are about to end: before the loss of a node, before a resize.

Runs in Ray Train's controller, which learns of both first, and calls the coordinator. Guarantees: a
node whose removal was announced costs no step from before the notice; before a resize the run has
saved, or the reason why not was logged. Never raises: Ray would take it for a failure of the run.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

log = logging.getLogger("dist_ft.preemption")
DEFAULT_NOTICE_S = 120.0
"""How long Ray Train leaves workers on a node whose removal was announced without a deadline."""
MIN_SAVE_S = 3.0
"""No save is started closer to the deadline than this."""
MAX_RESIZE_WAIT_S = 600.0
"""How long a resize waits for the save before it."""
POLL_S = 0.2


class PreemptionInfo(Protocol):
    """What Ray Train knows of nodes that will be taken away.

    Attributes:
        preempted_node_to_ranks: the ranks of our workers on each of the nodes.
        deadline_ms: when the first node ends (time.time, in ms); None: unknown.
    """

    @property
    def preempted_node_to_ranks(self) -> Mapping[str, Sequence[int]]: ...  # noqa: D102
    @property
    def deadline_ms(self) -> float | None: ...  # noqa: D102


class PreemptionSaver:
    """Requests the saves of a run; `get_coordinator` returns its coordinator."""

    def __init__(self, get_coordinator: Callable[[], Any]) -> None:
        self._get_coordinator = get_coordinator
        self._nodes: frozenset[str] = frozenset()  # of the last notice
        self._unannounced: frozenset[str] = frozenset()  # those of them still to announce
        self._announced_at = 0.0
        self._requested_at = 0.0
        self._save_number = 0

    def on_preemption(self, info: PreemptionInfo, now_s: float) -> None:
        """Save at once, and again as the deadline approaches, because training continues.

        Called repeatedly until then; `now_s` is on the clock of the deadline (time.time).
        """
        # Only a node that is new in the notice needs a save at once: Ray repeats the others.
        nodes = info.preempted_node_to_ranks
        known_nodes, self._nodes = self._nodes, frozenset(nodes)
        new_nodes = self._nodes - known_nodes
        if new_nodes:
            self._announced_at = now_s

        # A node stays in this set until its loss is announced and a save requested: if the
        # coordinator does not answer now, the next notice tries again.
        self._unannounced = (self._unannounced & self._nodes) | new_nodes
        must_announce = bool(self._unannounced)

        if info.deadline_ms is None:
            deadline_s = self._announced_at + DEFAULT_NOTICE_S
        else:
            deadline_s = info.deadline_ms / 1000

        # Before the coordinator is looked up: Ray calls this about once a second.
        if not must_announce and not is_save_due(now_s, self._requested_at, deadline_s):
            return

        with _log_errors():
            coordinator = self._get_coordinator()

            # One save at a time: while a slow one runs, a further request would only queue.
            if not must_announce and not coordinator.is_save_done(self._save_number):
                return

            if must_announce:
                # Announce before saving: if the node ends early, its loss costs no restart.
                description = describe_nodes(nodes)
                coordinator.announce_node_loss(description)
                coordinator.add_line(
                    "log",
                    f"WARNING {description} will be taken away in "
                    f"{max(0.0, deadline_s - now_s):.0f} s: saving now; training continues",
                )

            self._save_number = coordinator.request_save()
            self._requested_at = now_s
            self._unannounced = frozenset()

    def save_before_resize(self) -> None:
        """Save and wait for it: the workers are about to end."""
        with _log_errors():
            coordinator = self._get_coordinator()

            # Ray ends the workers as soon as this returns, so it waits for the save.
            until = time.monotonic() + MAX_RESIZE_WAIT_S
            coordinator.add_line(
                "log", "INFO the number of workers is about to change: saving first"
            )
            number = coordinator.request_save()
            while not coordinator.is_save_done(number) and time.monotonic() < until:
                time.sleep(POLL_S)


@contextlib.contextmanager
def _log_errors() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        log.warning("no save before workers end: %s: %s", type(error).__name__, error)


def is_save_due(now_s: float, requested_at_s: float, deadline_s: float) -> bool:
    """Return whether half of the time left at the last request is over, and enough remains."""
    return (requested_at_s + deadline_s) / 2 <= now_s <= deadline_s - MIN_SAVE_S


def describe_nodes(nodes: Mapping[str, Sequence[int]]) -> str:
    """Return the nodes and the workers on them as text, e.g. "node 01234567 (workers 1, 2)"."""
    descriptions = []
    for name, ranks in sorted(nodes.items()):
        noun = "workers" if len(ranks) > 1 else "worker"
        descriptions.append(f"node {name[:8]} ({noun} {', '.join(map(str, ranks))})")
    return ", ".join(descriptions)
