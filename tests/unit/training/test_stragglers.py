"""Who is slow, from what workers tell. That a stopped one tells it: tests/faults."""

from __future__ import annotations

import pytest
import torch

from dist_ft.core.world import Collectives, World
from dist_ft.training.stragglers import Pace, StragglerDetector, judge, probe


def pace(rank: int, stood: float = 0.01, data: float = 0.0, probe_s: float = 1e-3) -> Pace:
    return Pace(rank, f"node-{rank}", stood, data, probe_s)


def test_nobody_is_slow_where_all_are_alike():
    assert judge([pace(rank) for rank in range(8)]) == {}
    assert judge([pace(rank, stood=0.6, data=0.3, probe_s=9.0) for rank in range(8)]) == {}, (
        "all of them: not one's fault"
    )


@pytest.mark.parametrize(
    ("slow", "said"),
    [
        (
            {"stood": 0.5},
            "it stood still (stopped, or without a CPU) 50% of the time (usual here: 1%)",
        ),
        ({"data": 0.4}, "it waited for data 40% of the time (usual here: 0%)"),
        ({"probe_s": 2e-3}, "a matrix product takes it 2.0 times as long as usual here"),
    ],
)
@pytest.mark.parametrize("size", [2, 3, 8])
def test_the_slow_one_is_named_with_what_is_slow(slow, said, size):
    assert judge([pace(rank) for rank in range(size - 1)] + [pace(size - 1, **slow)]) == {
        size - 1: said
    }


def test_a_small_difference_is_none():
    assert judge([pace(0), pace(1, stood=0.15, data=0.1, probe_s=1.4e-3)]) == {}


def test_a_world_of_one_compares_nothing():
    alone = StragglerDetector(World(), Collectives(), torch.device("cpu"), 1)
    assert alone.after_step(1, 0.5) == {}
    alone.close()


def test_the_probe_takes_some_time():
    assert 0 < probe(torch.device("cpu")) < 5
