"""Wall time by part: parts sum to it, none is negative, and repeated work is lost."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_ft.planning.goodput import (
    PARTS,
    WORK,
    AttemptTime,
    attempt_time_by_part,
    attributed_share,
    num_kept_steps,
    time_by_part,
)

seconds = st.dictionaries(
    st.sampled_from([part for part in PARTS if part != "restart"]), st.floats(0, 1e6)
)


@st.composite
def histories(draw) -> list[AttemptTime]:
    """Return any attempts, with contradicting clocks and marks in any order."""
    found = []
    for number in range(1, draw(st.integers(0, 5)) + 1):
        marks = draw(st.lists(st.tuples(st.integers(0, 50), seconds), max_size=4))
        found.append(
            AttemptTime(
                number,
                draw(st.floats(0, 1e7)),
                draw(st.none() | st.integers(0, 50)),
                draw(seconds),
                marks,
            )
        )
    return found


@given(histories())
def test_parts_sum_to_the_wall_time_and_are_not_negative(attempts):
    total = time_by_part(attempts)
    assert set(total) == set(PARTS) and min(total.values()) >= 0
    gaps = sum(max(0.0, b.started_at - a.started_at - a.wall_s) for a, b in pairwise(attempts))
    assert sum(total.values()) == pytest.approx(sum(a.wall_s for a in attempts) + gaps)
    assert 0 <= attributed_share(total) <= 1


@given(histories(), st.integers(0, 50))
def test_only_work_is_lost_and_fewer_kept_steps_lose_more(attempts, kept):
    for attempt_time in attempts:
        marks = sorted(attempt_time.marks, key=lambda mark: mark[0])
        ordered = AttemptTime(
            attempt_time.attempt,
            0,
            None,
            attempt_time.seconds,
            [
                (
                    step,
                    {
                        part: min(
                            attempt_time.seconds.get(part, 0.0),
                            max((then.get(part, 0.0) for _, then in marks[: i + 1]), default=0.0),
                        )
                        for part in WORK
                    },
                )
                for i, (step, _) in enumerate(marks)
            ],
        )
        fewer, more = attempt_time_by_part(ordered, kept), attempt_time_by_part(ordered, kept + 1)
        assert fewer["lost"] >= more["lost"] - 1e-6
        for part in ("save", "start"):
            assert fewer[part] == attempt_time.seconds.get(part, 0.0)


def attempt(
    number: int,
    started_at: float,
    resumed_at: int | None,
    compute: float,
    *marks: tuple[int, float],
) -> AttemptTime:
    return AttemptTime(
        number,
        started_at,
        resumed_at,
        {"start": 3.0, "compute": compute},
        [(step, {"start": 3.0, "compute": then}) for step, then in marks],
    )


def test_work_after_the_resumed_checkpoint_is_lost():
    first = attempt(
        1, 100.0, 0, 40.0, (4, 16.0), (8, 32.0)
    )  # until 143; killed while the checkpoint of step 8 is written
    second = attempt(2, 150.0, 4, 20.0, (8, 16.0))  # until 173
    total = time_by_part([second, first])
    assert total == {
        **dict.fromkeys(PARTS, 0.0),
        "compute": 16.0 + 20.0,
        "lost": 24.0,
        "start": 6.0,
        "restart": 7.0,
    }


def test_attempt_may_repeat_work_of_two_earlier_attempts():
    """The latest checkpoint is damaged: the third attempt resumes before the second."""
    attempts = [
        attempt(1, 0.0, 0, 40.0, (4, 16.0), (8, 32.0)),
        attempt(2, 50.0, 8, 10.0),
        attempt(3, 70.0, 4, 9.0),
    ]
    assert num_kept_steps(attempts[1:]) == 4
    total = time_by_part(attempts)
    assert total["lost"] == 24.0 + 10.0 and total["compute"] == 16.0 + 9.0


def test_attempt_that_ended_before_resuming_loses_nothing():
    attempts = [attempt(1, 0.0, 0, 40.0, (4, 16.0)), AttemptTime(2, 60.0, None, {"start": 1.0})]
    assert time_by_part(attempts)["lost"] == 0.0


def test_contradicting_clocks_give_no_negative_time():
    assert time_by_part([attempt(1, 1000.0, 0, 40.0), attempt(2, 990.0, 0, 5.0)])["restart"] == 0.0


def test_run_without_attempts_is_fully_attributed():
    assert attributed_share(time_by_part([])) == 1.0
