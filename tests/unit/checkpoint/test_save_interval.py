"""The interval between saves is optimal in a simulation of runs that fail."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_ft.checkpoint.save_interval import SaveCost, daly_interval_s, mean_time_between_failures_s


def wasted(interval: float, cost: float, between: float) -> float:
    """Return the expected time lost per second of progress (Daly's model, no restart cost)."""
    return between * math.expm1((interval + cost) / between) / interval - 1


@given(st.floats(0.01, 300), st.floats(1000, 1e6))
def test_no_other_interval_is_much_better(cost, between):
    best = daly_interval_s(cost, between)
    least = min(wasted(other, cost, between) for other in np.geomspace(cost / 2, between, 400))
    assert wasted(best, cost, between) <= least * 1.02


def test_the_interval_is_optimal_in_a_simulation():
    """Young's 465 s for 3 hours between failures and 10 s per save agree with the simulation."""
    rng, cost, between = np.random.default_rng(0), 10.0, 10800.0
    best = daly_interval_s(cost, between)
    assert best == pytest.approx(math.sqrt(2 * cost * between), rel=0.03)

    def took(interval: float) -> float:
        need, time = 3_000_000.0, 0.0
        while need > 0:
            until = rng.exponential(between)
            done = min(math.floor(until / (interval + cost)) * interval, need)
            need, time = need - done, time + (until if need > done else done)
        return time

    assert took(best) < took(best / 6) and took(best) < took(best * 6)


def test_a_cost_above_the_time_between_failures():
    assert daly_interval_s(500, 100) == 100


def test_observed_failures_outweigh_the_expected_rate():
    assert mean_time_between_failures_s(10800, 0, 0) == 10800
    assert mean_time_between_failures_s(10800, 864000, 0) == 874800
    assert mean_time_between_failures_s(10800, 864000, 80) == 10800


def test_the_cost_is_blocked_time_plus_slower_steps():
    cost = SaveCost()
    assert cost.optimal_interval_s(1000) is None
    for _ in range(5):
        cost.record_step(2.0, busy=False)
    cost.record_start(0.5)
    for _ in range(4):
        cost.record_step(2.25, busy=True)
    cost.record_end()
    assert cost.cost_s == pytest.approx(0.5 + 4 * 0.25)
    assert cost.optimal_interval_s(10800) == daly_interval_s(1.5, 10800)


def test_the_interval_is_longer_than_writing_a_save():
    cost = SaveCost()
    cost.record_step(1.0, busy=False)
    cost.record_start(0.0)
    for _ in range(300):
        cost.record_step(1.0, busy=True)
    cost.record_end()
    assert cost.optimal_interval_s(10800) == pytest.approx(330)
