"""The learning rate is a function of the step."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from dist_ft.config.schema import ScheduleSection
from dist_ft.engine.schedule import learning_rate_factor, warmup_steps


def factors(total: int, **fields) -> list[float]:
    return [learning_rate_factor(ScheduleSection(**fields), step, total) for step in range(total)]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"name": "constant"}, [1.0, 1.0, 1.0, 1.0]),
        ({"name": "constant", "warmup_steps": 3, "min_ratio": 0.5}, [0.25, 0.5, 0.75, 1.0]),
        ({"name": "linear"}, [1.0, 0.75, 0.5, 0.25]),
        ({"name": "linear", "min_ratio": 0.2}, [1.0, 0.8, 0.6, 0.4]),
        ({"name": "linear", "warmup_steps": 2}, [1 / 3, 2 / 3, 1.0, 0.5]),
        ({"name": "linear", "warmup_ratio": 0.5}, [1 / 3, 2 / 3, 1.0, 0.5]),
        ({"name": "cosine"}, [1.0, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125)]),
        (
            {"name": "cosine", "min_ratio": 0.1},
            [1.0, 0.1 + 0.9 * (0.5 + math.sqrt(0.125)), 0.55, 0.1 + 0.9 * (0.5 - math.sqrt(0.125))],
        ),
    ],
)
def test_factors_of_all_schedules(fields, expected):
    assert factors(4, **fields) == pytest.approx(expected)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_after_the_end_the_rate_stays_at_the_minimum(name):
    section = ScheduleSection(name=name, min_ratio=0.1)
    assert [learning_rate_factor(section, step, 10) for step in (10, 11, 99)] == pytest.approx(
        [0.1] * 3
    )


@pytest.mark.parametrize("name", ["linear", "cosine", "constant"])
def test_the_rate_rises_only_during_warm_up(name):
    values = factors(50, name=name, warmup_steps=7)
    assert all(a < b for a, b in pairwise(values[:8])) and values[7] == 1.0
    assert all(a >= b for a, b in pairwise(values[7:])) and min(values) > 0


@pytest.mark.parametrize(
    ("ratio", "total", "expected"),
    [(None, 10, 0), (0.0, 10, 0), (0.07, 100, 7), (0.1, 30, 3), (0.03, 10, 1), (1.0, 5, 5)],
)
def test_warm_up_by_ratio(ratio, total, expected):
    assert warmup_steps(ScheduleSection(warmup_ratio=ratio), total) == expected


def test_warm_up_longer_than_the_run():
    assert factors(3, name="cosine", warmup_steps=9) == pytest.approx([0.1, 0.2, 0.3])
    assert warmup_steps(ScheduleSection(warmup_steps=0, warmup_ratio=0.5), 10) == 0
