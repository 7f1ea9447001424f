"""Which workers are slow, from their measurements. A worker that is stopped: tests/faults."""

from __future__ import annotations

import pytest
import torch

from dist_ft.core.world import Collectives, World
from dist_ft.training.stragglers import (
    Pace,
    StragglerDetector,
    find_slow_workers,
    time_matrix_product,
)


def pace(rank: int, stalled: float = 0.01, data: float = 0.0, probe_s: float = 1e-3) -> Pace:
    return Pace(rank, f"node-{rank}", stalled, data, probe_s)


def test_no_worker_is_slow_where_all_are_alike():
    assert find_slow_workers([pace(rank) for rank in range(8)]) == {}
    assert (
        find_slow_workers([pace(rank, stalled=0.6, data=0.3, probe_s=9.0) for rank in range(8)])
        == {}
    ), "all are equally slow"


@pytest.mark.parametrize(
    ("slow", "reason"),
    [
        (
            {"stalled": 0.5},
            "it was stalled (stopped, or without a CPU) 50% of the time (typical: 1%)",
        ),
        ({"data": 0.4}, "it waited for data 40% of the time (typical: 0%)"),
        ({"probe_s": 2e-3}, "a matrix product takes it 2.0 times as long as is typical"),
    ],
)
@pytest.mark.parametrize("size", [2, 3, 8])
def test_slow_worker_is_named_with_the_reason(slow, reason, size):
    assert find_slow_workers(
        [pace(rank) for rank in range(size - 1)] + [pace(size - 1, **slow)]
    ) == {size - 1: reason}


def test_small_differences_are_ignored():
    assert find_slow_workers([pace(0), pace(1, stalled=0.15, data=0.1, probe_s=1.4e-3)]) == {}


def test_single_worker_has_no_metrics():
    alone = StragglerDetector(World(), Collectives(), torch.device("cpu"), 1)
    assert alone.after_step(1, 0.5) == {}
    alone.close()


def test_matrix_product_takes_some_time():
    assert 0 < time_matrix_product(torch.device("cpu")) < 5
