"""When a save is asked for, given what Ray's controller says."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field

from dist_ft.runtime.elastic.coordinator import Relay
from dist_ft.runtime.elastic.preemption import LEAST_S, UNKNOWN_S, Saves, is_due
from dist_ft.runtime.elastic.restart_policy import Member


@dataclass
class Info:
    """As Ray's."""

    deadline_ms: float | None
    preempted_node_to_ranks: dict[str, list[int]] = field(
        default_factory=lambda: {"abcdef0123": [1, 2]}
    )


def wishes(relay: Relay) -> int:
    return relay.look(Member("k", 0, 1, "node", "host:1"), 0).saves


def asked_at(saves: Saves, relay: Relay, info: Info, first: int, last: int) -> list[int]:
    """Tell of the same nodes every two seconds; return when saves were asked for."""
    found, before = [], wishes(relay)
    for now in range(first, last, 2):
        saves.nodes_go(info, now)
        found += [now] * (wishes(relay) - before)
        before = wishes(relay)
    return found


def test_a_node_that_goes_is_saved_for_at_once_and_again_as_time_runs_out():
    relay = Relay()
    saves = Saves(lambda: relay)
    assert asked_at(saves, relay, Info(1120_000), 1000, 1200) == [1000, 1060, 1090, 1106, 1114]
    assert relay.take() == [
        (
            "log",
            "WARNING node abcdef01 (workers 1, 2) will be taken away in 120 s: saving now, training "
            "goes on",
        )
    ]
    both = Info(1320_000, {"abcdef0123": [1, 2], "0123456789": [0]})
    assert asked_at(saves, relay, both, 1300, 1310) == [1300], "another node goes too"
    assert relay.take() == [
        (
            "log",
            "WARNING node 01234567 (worker 0), node abcdef01 (workers 1, 2) will be taken away in "
            "20 s: saving now, training goes on",
        )
    ]


def test_the_next_save_waits_for_the_answer_of_the_one_before():
    relay, me = Relay(), Member("k", 0, 1, "node", "host:1")
    relay.meet(me, 0)
    saves = Saves(lambda: relay)
    assert asked_at(saves, relay, Info(1120_000), 1000, 1080) == [1000]
    relay.saved(1)
    assert asked_at(saves, relay, Info(1120_000), 1080, 1098) == [1080]
    relay.saved(2)
    assert asked_at(saves, relay, Info(1120_000), 1098, 1130) == [1100]


def test_a_node_that_goes_nobody_says_when():
    relay = Relay()
    found = asked_at(Saves(lambda: relay), relay, Info(None), 1000, 1300)
    assert (
        found == asked_at(Saves(lambda: relay), relay, Info((1000 + UNKNOWN_S) * 1000), 1000, 1300)
        and len(found) > 2
    )


def test_nothing_is_begun_near_the_end():
    assert is_due(60, 0, 120) and is_due(120 - LEAST_S, 0, 120)
    assert (
        not is_due(59, 0, 120) and not is_due(120.1 - LEAST_S, 0, 120) and not is_due(500, 0, 120)
    )


def test_a_resize_waits_until_the_save_before_it_is_answered():
    relay = Relay()
    me = Member("k", 0, 1, "node", "host:1")
    relay.meet(me, 0)
    thread = threading.Thread(target=Saves(lambda: relay).before_resize, daemon=True)
    thread.start()
    until = time.monotonic() + 10
    while not relay.look(me, 0).saves and time.monotonic() < until:
        time.sleep(0.01)
    thread.join(0.5)
    assert thread.is_alive()
    relay.saved(1)
    thread.join(10)
    assert not thread.is_alive()


def test_a_relay_that_is_gone_is_no_error(caplog):
    def gone() -> Relay:
        raise ConnectionError("gone")

    Saves(gone).before_resize()
    Saves(gone).nodes_go(Info(None), 0)
    assert caplog.messages == ["no save before workers end: ConnectionError: gone"] * 2
