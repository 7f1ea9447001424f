"""When a run reached its limit of time or cost, and what its message says."""

from __future__ import annotations

import math

import pytest

from dist_ft.planning.run_limits import RunLimits, Usage

HOUR_S = 3600.0


@pytest.mark.parametrize(
    ("limits", "elapsed_s", "expected"),
    [
        pytest.param(RunLimits(), 1e9, "", id="no limit"),
        pytest.param(RunLimits(max_hours=2), 2 * HOUR_S - 1, "", id="not yet"),
        pytest.param(
            RunLimits(max_hours=2),
            2 * HOUR_S,
            "run.max_hours=2: reached, with 2.00 hours of 1 attempt",
            id="time",
        ),
        pytest.param(
            RunLimits(max_hours=2, used=Usage(1.5 * HOUR_S, 9 * HOUR_S, 2)),
            0.5 * HOUR_S,
            "run.max_hours=2: reached, with 2.00 hours of 3 attempts",
            id="time of earlier attempts counts",
        ),
        pytest.param(
            RunLimits(max_cost=50, cost_per_hour=2, num_workers=4, used=Usage(0, 20 * HOUR_S, 1)),
            HOUR_S,
            "",
            id="40 + 8 of 50",
        ),
        pytest.param(
            RunLimits(max_cost=50, cost_per_hour=2, num_workers=4, used=Usage(0, 20 * HOUR_S, 1)),
            1.25 * HOUR_S,
            "run.max_cost=50: reached, with 1.25 hours of 2 attempts and a cost of 50.00",
            id="cost of all workers",
        ),
        pytest.param(
            RunLimits(max_hours=1, used=Usage(HOUR_S, HOUR_S, 3)),
            0,
            "run.max_hours=1: reached, with 1.00 hours of 3 attempts",
            id="before this attempt",
        ),
    ],
)
def test_limit_is_reached(limits: RunLimits, elapsed_s: float, expected: str) -> None:
    assert limits.reached(elapsed_s) == expected
    assert limits.is_set == (limits != RunLimits())


def test_hours_left_are_those_of_the_first_limit() -> None:
    assert RunLimits().hours_left() == math.inf
    assert RunLimits(max_hours=3, used=Usage(HOUR_S, HOUR_S, 1)).hours_left() == 2
    limits = RunLimits(3, 10, cost_per_hour=1, num_workers=2, used=Usage(HOUR_S, 4 * HOUR_S, 1))
    assert limits.hours_left() == 2, "the time"
    assert RunLimits(9, 10, 1.0, 2, limits.used).hours_left() == 3, "the cost"


def test_lost_records_do_not_set_the_time_back() -> None:
    limits = RunLimits(max_hours=1, used=Usage(10, 10, 1)).with_trained(HOUR_S)
    assert limits.reached(0)
    assert RunLimits(max_hours=1, used=Usage(HOUR_S, HOUR_S, 1)).with_trained(5).reached(0)


@pytest.mark.parametrize(
    ("limits", "fields"),
    [
        (RunLimits(max_hours=1), "run.max_hours"),
        (RunLimits(max_cost=1), "run.max_cost"),
        (RunLimits(1, 1), "run.max_hours or run.max_cost"),
    ],
)
def test_remedy_names_what_to_raise(limits: RunLimits, fields: str) -> None:
    assert limits.remedy == f"raise {fields}, then run the same command to resume"
