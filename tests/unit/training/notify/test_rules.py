"""When restarts and standstill are worth a notice."""

from __future__ import annotations

from dist_ft.training.notify.rules import ProgressWatch, RestartCounter


def test_restarts_count_within_a_time() -> None:
    counter = RestartCounter(3, within_s=100)
    assert [counter.add(at_s) for at_s in (0, 10, 20)] == [0, 0, 3]
    assert [counter.add(at_s) for at_s in (30, 40)] == [0, 0], "a further notice needs as many"
    assert counter.add(50) == 3
    slow = RestartCounter(3, within_s=100)
    assert [slow.add(at_s) for at_s in (0, 60, 120, 180, 240)] == [0] * 5


def test_restarts_before_this_process_count() -> None:
    assert RestartCounter(3, 100, [-20, -50]).add(0) == 3
    assert RestartCounter(3, 100, [-20, -101]).add(0) == 0
    assert RestartCounter(1, 100).add(0) == 1


def test_standstill_is_reported_once_until_there_is_progress() -> None:
    watch = ProgressWatch(limit_s=60, now_s=0)
    assert [watch.standstill_s(at_s) for at_s in (59, 60, 61, 1000)] == [0, 60, 0, 0]
    watch.record(1000)
    assert [watch.standstill_s(at_s) for at_s in (1059, 1070, 1080)] == [0, 70, 0]
    assert ProgressWatch(limit_s=0, now_s=0).standstill_s(1e9) == 0, "switched off"
