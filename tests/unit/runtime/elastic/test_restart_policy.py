"""Decisions of the restart policy, without workers and clocks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from dist_ft.runtime.elastic.restart_policy import (
    MAX_BACKOFF_S,
    SETTLE_S,
    AnnouncedLoss,
    Failure,
    FailureReport,
    GiveUp,
    Restart,
    RestartHistory,
    RestartPolicy,
    Wait,
    backoff_s,
    find_cause,
)

KILLED = Failure(1, "node", "killed", "by SIGKILL")
BUG = Failure(0, "node", "error", "KeyError: 'x'")
OTHER_BUG = Failure(0, "node", "error", "KeyError: 'y'")
PEER = Failure(0, "node", "peer", "Connection closed by peer")
ABORT = Failure(0, "node", "crash", "by SIGABRT")
ABORT_ELSEWHERE = Failure(1, "other", "crash", "by SIGABRT")
SEGFAULT = Failure(0, "node", "crash", "by SIGSEGV")
LOST = Failure(1, "node", "lost", "a worker or its node was lost")
ANNOUNCED = AnnouncedLoss("node abc (worker 1)", last_generation=3)
PLANNED_LOSS = "planned: node abc (worker 1) was taken away, as announced"


def reports(*items: tuple[Failure, float]) -> list[FailureReport]:
    return [FailureReport(failure, at_s) for failure, at_s in items]


@pytest.mark.parametrize(
    ("reported", "now_s", "expected"),
    [
        pytest.param([(KILLED, 5.0)], 5.0, KILLED, id="a cause is acted on at once"),
        pytest.param([(PEER, 5.0)], 5.0, 5.0 + SETTLE_S, id="a lost peer may still report"),
        pytest.param([(PEER, 5.0)], 5.0 + SETTLE_S, PEER, id="until the time is over"),
        pytest.param([(PEER, 5.0), (KILLED, 5.2)], 5.2, KILLED, id="the peer's report ends it"),
        pytest.param(
            [(PEER, 5.0), (PEER, 5.5)], 5.5, 5.0 + SETTLE_S, id="another peer does not prolong it"
        ),
        pytest.param([(PEER, 5.0), (PEER, 5.5)], 6.0, PEER, id="it counts from the first report"),
        pytest.param([(ABORT, 5.0)], 5.0, 5.0 + SETTLE_S, id="an abort may follow a loss"),
        pytest.param([(ABORT, 5.0)], 5.0 + SETTLE_S, ABORT, id="an abort alone is the cause"),
        pytest.param([(ABORT, 5.0), (KILLED, 5.2)], 5.2, KILLED, id="the kill explains the abort"),
        pytest.param([(SEGFAULT, 5.0)], 5.0, SEGFAULT, id="other signals are causes"),
    ],
)
def test_policy_waits_for_the_cause_after_the_loss_of_a_peer(
    reported: list[tuple[Failure, float]], now_s: float, expected: Failure | float
) -> None:
    decision = RestartPolicy(3).on_failure(reports(*reported), 0, RestartHistory(), now_s)
    if isinstance(expected, float):
        assert decision == Wait(expected)
    else:
        history = RestartHistory((expected,), start_at_s=now_s)
        assert decision == Restart(str(expected), history, expected)


@pytest.mark.parametrize(
    ("max_failures", "before", "failure", "message"),
    [
        pytest.param(1, [], KILLED, None, id="within the budget"),
        pytest.param(1, [KILLED], KILLED, "gave up after cluster.max_failures=1", id="beyond it"),
        pytest.param(0, [], KILLED, "gave up after cluster.max_failures=0", id="no budget"),
        pytest.param(-1, [KILLED] * 99, KILLED, None, id="no limit"),
        pytest.param(9, [BUG], BUG, "the same failure repeated", id="the same bug twice"),
        pytest.param(9, [BUG], OTHER_BUG, None, id="two different bugs"),
        pytest.param(9, [BUG, KILLED], BUG, None, id="the same bug, but not in succession"),
        pytest.param(-1, [BUG], BUG, "the same failure repeated", id="also without a limit"),
        pytest.param(1, [BUG], BUG, "gave up after", id="the budget is checked first"),
        pytest.param(9, [KILLED], KILLED, None, id="kills may repeat"),
        pytest.param(9, [ABORT], ABORT_ELSEWHERE, None, id="two aborts on different workers"),
        pytest.param(
            9, [ABORT, ABORT_ELSEWHERE, ABORT], ABORT_ELSEWHERE, None, id="aborts that alternate"
        ),
        pytest.param(2, [ABORT, ABORT_ELSEWHERE], ABORT, "gave up after", id="but the budget"),
        pytest.param(9, [ABORT], ABORT, None, id="two aborts of one worker may be chance"),
        pytest.param(9, [ABORT, ABORT], ABORT, "the same failure repeated", id="three are not"),
        pytest.param(
            9, [SEGFAULT, SEGFAULT], SEGFAULT, "the same failure repeated", id="three segfaults"
        ),
        pytest.param(
            9,
            [SEGFAULT, replace(SEGFAULT, rank=1)],
            SEGFAULT,
            None,
            id="segfaults on different workers",
        ),
        pytest.param(
            -1, [SEGFAULT, SEGFAULT], SEGFAULT, "the same failure repeated", id="without a limit"
        ),
    ],
)
def test_policy_gives_up(
    max_failures: int, before: list[Failure], failure: Failure, message: str | None
) -> None:
    history = RestartHistory(tuple(before))
    now_s = 10.0 + SETTLE_S
    decision = RestartPolicy(max_failures).on_failure(reports((failure, 10.0)), 7, history, now_s)
    after = RestartHistory((*before, failure), start_at_s=now_s + backoff_s(len(before) + 1))
    if message is None:
        assert decision == Restart(str(failure), after, failure)
    else:
        assert isinstance(decision, GiveUp) and decision.message.startswith(message)
        assert (decision.reason, decision.history, decision.cause) == (str(failure), after, failure)
        assert str(failure) in decision.message
        assert "run the same command to resume" in decision.message


@pytest.mark.parametrize(
    ("failure", "generation", "is_planned", "pending"),
    [
        pytest.param(LOST, 2, True, None, id="the announced loss"),
        pytest.param(PEER, 2, True, ANNOUNCED, id="noticed by its peers first"),
        pytest.param(ABORT, 2, True, ANNOUNCED, id="nccl aborts its peers first"),
        pytest.param(LOST, 3, True, None, id="in the last generation it explains"),
        pytest.param(LOST, 4, False, ANNOUNCED, id="too late"),
        pytest.param(KILLED, 2, False, ANNOUNCED, id="another failure"),
    ],
)
def test_announced_loss_costs_nothing(
    failure: Failure, generation: int, is_planned: bool, pending: AnnouncedLoss | None
) -> None:
    history = RestartHistory((BUG,), start_at_s=50.0, announced_loss=ANNOUNCED)
    decision = RestartPolicy(9).on_failure(reports((failure, 10.0)), generation, history, 11.0)
    assert isinstance(decision, Restart) and decision.cause == failure
    if is_planned:
        assert decision.reason == PLANNED_LOSS
        assert decision.history == replace(history, announced_loss=pending)
    else:
        assert decision.reason == str(failure)
        assert decision.history.failures == (BUG, failure)
        assert decision.history.start_at_s == 11.0 + backoff_s(2)
        assert decision.history.announced_loss == pending


@pytest.mark.parametrize(
    ("before", "is_larger", "has_started", "failures", "reason"),
    [
        pytest.param([], False, True, [LOST], str(LOST), id="a loss"),
        pytest.param(
            [PEER], False, False, [LOST], str(LOST), id="its peers failed first: one loss"
        ),
        pytest.param([PEER], False, True, [PEER, LOST], str(LOST), id="two losses"),
        pytest.param(
            [ABORT], False, False, [LOST], str(LOST), id="nccl aborted its peers first: one loss"
        ),
        pytest.param([SEGFAULT], False, False, [SEGFAULT, LOST], str(LOST), id="a crash, a loss"),
        pytest.param([BUG], False, False, [BUG, LOST], str(LOST), id="a loss after a bug"),
        pytest.param([], True, True, [], "planned: more workers joined", id="more workers"),
        pytest.param(
            [PEER], True, False, [], "planned: more workers joined", id="more, after a loss"
        ),
    ],
)
def test_replacement_counts_one_loss_unless_the_group_grows(
    before: list[Failure], is_larger: bool, has_started: bool, failures: list[Failure], reason: str
) -> None:
    decision = RestartPolicy(9).on_replacement(
        LOST,
        is_larger=is_larger,
        has_started=has_started,
        generation=1,
        history=RestartHistory(tuple(before)),
        now_s=0.0,
    )
    assert isinstance(decision, Restart)
    assert (decision.reason, decision.history.failures) == (reason, tuple(failures))
    assert decision.cause == (None if is_larger else LOST)


def test_announced_loss_by_replacement_costs_nothing() -> None:
    arguments: dict[str, Any] = {
        "is_larger": False,
        "has_started": True,
        "generation": 3,
        "history": RestartHistory(announced_loss=ANNOUNCED),
        "now_s": 0.0,
    }
    decision = RestartPolicy(0).on_replacement(LOST, **arguments)
    assert decision == Restart(PLANNED_LOSS, RestartHistory(), LOST)
    late = RestartPolicy(0).on_replacement(LOST, **{**arguments, "generation": 4})
    assert isinstance(late, GiveUp)


def test_cause_is_the_first_failure_that_is_not_a_lost_peer() -> None:
    assert find_cause(reports((PEER, 0), (KILLED, 1), (BUG, 2))) == KILLED
    assert find_cause(reports((PEER, 0), (replace(PEER, rank=2), 1))) == PEER


def test_abort_is_named_only_if_nothing_else_explains_it() -> None:
    assert find_cause(reports((ABORT, 0), (PEER, 1))) == find_cause(reports((ABORT, 0))) == ABORT
    assert find_cause(reports((ABORT, 0), (replace(KILLED, rank=1), 1))).kind == "killed"
    assert find_cause(reports((ABORT, 0), (SEGFAULT, 1))) == SEGFAULT

    # Another worker failed first, or several aborted: none of them is known as the cause.
    later = find_cause(reports((replace(PEER, rank=1), 0), (ABORT, 1)))
    several = find_cause(reports((ABORT, 0), (ABORT_ELSEWHERE, 1)))
    expected = replace(ABORT, kind="peer", text="by SIGABRT, as NCCL ends a worker without a peer")
    assert later == several == expected


def test_aborts_of_several_workers_never_count_as_repeated() -> None:
    policy, history = RestartPolicy(-1), RestartHistory()
    for number in range(9):
        both = reports((ABORT, number * 100.0), (ABORT_ELSEWHERE, number * 100.0))
        decision = policy.on_failure(both, number, history, number * 100.0 + SETTLE_S)
        assert isinstance(decision, Restart), number
        history = decision.history


def test_backoff_doubles_up_to_a_limit() -> None:
    assert [backoff_s(count) for count in range(6)] == [0, 0, 1, 2, 4, 8]
    assert backoff_s(100) == MAX_BACKOFF_S
