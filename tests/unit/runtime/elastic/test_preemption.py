"""When a save is requested, given what Ray's controller reports."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field

from dist_ft.runtime.elastic.coordinator import Coordinator
from dist_ft.runtime.elastic.messages import OutputLine
from dist_ft.runtime.elastic.preemption import (
    DEFAULT_NOTICE_S,
    MIN_SAVE_S,
    PreemptionSaver,
    is_save_due,
)
from dist_ft.runtime.elastic.worker_group_state import Member


@dataclass
class Info:
    """As Ray's."""

    deadline_ms: float | None
    preempted_node_to_ranks: dict[str, list[int]] = field(
        default_factory=lambda: {"abcdef0123": [1, 2]}
    )


def num_requests(coordinator: Coordinator) -> int:
    return coordinator.status(Member("k", 0, 1, "node", "host:1"), 0).save_number


def request_times(
    saver: PreemptionSaver, coordinator: Coordinator, info: Info, first: int, last: int
) -> list[int]:
    """Announce the same nodes every two seconds; return when saves were requested."""
    found, before = [], num_requests(coordinator)
    for now in range(first, last, 2):
        saver.on_preemption(info, now)
        found += [now] * (num_requests(coordinator) - before)
        before = num_requests(coordinator)
    return found


def test_announced_node_is_saved_for_at_once_and_again_as_time_runs_out():
    coordinator = Coordinator()
    saver = PreemptionSaver(lambda: coordinator)
    assert request_times(saver, coordinator, Info(1120_000), 1000, 1200) == [
        1000,
        1060,
        1090,
        1106,
        1114,
    ]
    assert coordinator.take_lines() == [
        OutputLine(
            "log",
            "WARNING node abcdef01 (workers 1, 2) will be taken away in 120 s: saving now; "
            "training continues",
        )
    ]
    both = Info(1320_000, {"abcdef0123": [1, 2], "0123456789": [0]})
    assert request_times(saver, coordinator, both, 1300, 1310) == [1300], (
        "another node is announced"
    )
    assert coordinator.take_lines() == [
        OutputLine(
            "log",
            "WARNING node 01234567 (worker 0), node abcdef01 (workers 1, 2) will be taken away in "
            "20 s: saving now; training continues",
        )
    ]


def test_next_save_waits_until_the_last_one_is_done():
    coordinator, me = Coordinator(), Member("k", 0, 1, "node", "host:1")
    coordinator.join(me, 0)
    saver = PreemptionSaver(lambda: coordinator)
    assert request_times(saver, coordinator, Info(1120_000), 1000, 1080) == [1000]
    coordinator.report_save_done(1)
    assert request_times(saver, coordinator, Info(1120_000), 1080, 1098) == [1080]
    coordinator.report_save_done(2)
    assert request_times(saver, coordinator, Info(1120_000), 1098, 1130) == [1100]


def test_unknown_deadline_counts_as_the_default_notice():
    coordinator = Coordinator()
    found = request_times(PreemptionSaver(lambda: coordinator), coordinator, Info(None), 1000, 1300)
    assert (
        found
        == request_times(
            PreemptionSaver(lambda: coordinator),
            coordinator,
            Info((1000 + DEFAULT_NOTICE_S) * 1000),
            1000,
            1300,
        )
        and len(found) > 2
    )


def test_no_save_starts_near_the_deadline():
    assert is_save_due(60, 0, 120) and is_save_due(120 - MIN_SAVE_S, 0, 120)
    assert (
        not is_save_due(59, 0, 120)
        and not is_save_due(120.1 - MIN_SAVE_S, 0, 120)
        and not is_save_due(500, 0, 120)
    )


def test_resize_waits_until_its_save_is_done():
    coordinator = Coordinator()
    me = Member("k", 0, 1, "node", "host:1")
    coordinator.join(me, 0)
    thread = threading.Thread(
        target=PreemptionSaver(lambda: coordinator).save_before_resize, daemon=True
    )
    thread.start()
    until = time.monotonic() + 10
    while not coordinator.status(me, 0).save_number and time.monotonic() < until:
        time.sleep(0.01)
    thread.join(0.5)
    assert thread.is_alive()
    coordinator.report_save_done(1)
    thread.join(10)
    assert not thread.is_alive()


def test_lost_coordinator_is_no_error(caplog):
    def gone() -> Coordinator:
        raise ConnectionError("gone")

    PreemptionSaver(gone).save_before_resize()
    PreemptionSaver(gone).on_preemption(Info(None), 0)
    assert caplog.messages == ["no save before workers end: ConnectionError: gone"] * 2


def test_loss_is_announced_once_the_coordinator_answers():
    """A first call that failed once left the node unannounced for good."""
    coordinator = Coordinator()
    failures = [ConnectionError("busy"), ConnectionError("busy")]

    def get() -> Coordinator:
        if failures:
            raise failures.pop()
        return coordinator

    saver = PreemptionSaver(get)
    assert request_times(saver, coordinator, Info(None), 1000, 1012) == [1004]
    assert coordinator._group_state._history.announced_loss.description == (
        "node abcdef01 (workers 1, 2)"
    )
    (line,) = coordinator.take_lines()
    assert "in 116 s" in line.text, "the deadline is counted from the first notice"


def test_save_that_could_not_be_requested_is_requested_again(monkeypatch):
    coordinator = Coordinator()
    saver = PreemptionSaver(lambda: coordinator)
    request, failures = coordinator.request_save, [ConnectionError("busy")]

    def request_save() -> int:
        if failures:
            raise failures.pop()
        return request()

    monkeypatch.setattr(coordinator, "request_save", request_save)
    assert request_times(saver, coordinator, Info(1120_000), 1000, 1050) == [1002]
    failures.append(ConnectionError("busy"))
    assert request_times(saver, coordinator, Info(1120_000), 1050, 1080) == [1064]
