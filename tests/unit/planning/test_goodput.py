"""Shares of wall time out of accounts: they sum to it, none is negative, and what is done again is lost."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_ft.planning.goodput import PARTS, WORK, Account, attributed, kept_steps, settled, spent

seconds = st.dictionaries(
    st.sampled_from([part for part in PARTS if part != "restart"]), st.floats(0, 1e6)
)


@st.composite
def histories(draw) -> list[Account]:
    """Attempts as they may be found: any accounts, clocks that contradict each other, marks in any shape."""
    found = []
    for number in range(1, draw(st.integers(0, 5)) + 1):
        marks = draw(st.lists(st.tuples(st.integers(0, 50), seconds), max_size=4))
        found.append(
            Account(
                number,
                draw(st.floats(0, 1e7)),
                draw(st.none() | st.integers(0, 50)),
                draw(seconds),
                marks,
            )
        )
    return found


@given(histories())
def test_shares_sum_to_the_wall_time_and_none_is_negative(accounts):
    total = spent(accounts)
    assert set(total) == set(PARTS) and min(total.values()) >= 0
    gaps = sum(max(0.0, b.begun_at - a.begun_at - a.wall_s) for a, b in pairwise(accounts))
    assert sum(total.values()) == pytest.approx(sum(a.wall_s for a in accounts) + gaps)
    assert 0 <= attributed(total) <= 1


@given(histories(), st.integers(0, 50))
def test_nothing_is_lost_that_is_not_work_and_fewer_kept_steps_lose_more(accounts, kept):
    for account in accounts:
        marks = sorted(account.marks, key=lambda mark: mark[0])
        ordered = Account(
            account.attempt,
            0,
            None,
            account.seconds,
            [
                (
                    step,
                    {
                        part: min(
                            account.seconds.get(part, 0.0),
                            max((then.get(part, 0.0) for _, then in marks[: i + 1]), default=0.0),
                        )
                        for part in WORK
                    },
                )
                for i, (step, _) in enumerate(marks)
            ],
        )
        fewer, more = settled(ordered, kept), settled(ordered, kept + 1)
        assert fewer["lost"] >= more["lost"] - 1e-6
        for part in ("save", "start"):
            assert fewer[part] == account.seconds.get(part, 0.0)


def attempt(
    number: int, begun_at: float, resumed_at: int | None, compute: float, *marks: tuple[int, float]
) -> Account:
    return Account(
        number,
        begun_at,
        resumed_at,
        {"start": 3.0, "compute": compute},
        [(step, {"start": 3.0, "compute": then}) for step, then in marks],
    )


def test_work_after_the_checkpoint_gone_on_from_is_lost():
    first = attempt(
        1, 100.0, 0, 40.0, (4, 16.0), (8, 32.0)
    )  # until 143; dies while the save of step 8 is written
    second = attempt(2, 150.0, 4, 20.0, (8, 16.0))  # until 173
    total = spent([second, first])
    assert total == {
        **dict.fromkeys(PARTS, 0.0),
        "compute": 16.0 + 20.0,
        "lost": 24.0,
        "start": 6.0,
        "restart": 7.0,
    }


def test_an_attempt_may_lose_what_is_two_before_it():
    """The newest checkpoint was damaged: the third attempt goes back behind where the second began."""
    accounts = [
        attempt(1, 0.0, 0, 40.0, (4, 16.0), (8, 32.0)),
        attempt(2, 50.0, 8, 10.0),
        attempt(3, 70.0, 4, 9.0),
    ]
    assert kept_steps(accounts[1:]) == 4
    total = spent(accounts)
    assert total["lost"] == 24.0 + 10.0 and total["compute"] == 16.0 + 9.0


def test_an_attempt_that_never_looked_for_a_checkpoint_takes_nothing_away():
    accounts = [attempt(1, 0.0, 0, 40.0, (4, 16.0)), Account(2, 60.0, None, {"start": 1.0})]
    assert spent(accounts)["lost"] == 0.0


def test_clocks_that_contradict_each_other_make_no_negative_time():
    assert spent([attempt(1, 1000.0, 0, 40.0), attempt(2, 990.0, 0, 5.0)])["restart"] == 0.0


def test_without_accounts_there_is_nothing_to_attribute():
    assert attributed(spent([])) == 1.0
