"""Who meets, who is replaced, and when the tries end."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from dist_ft.runtime.elastic.restart_policy import (
    MOST_BACKOFF_S,
    SETTLE_S,
    Failure,
    Generations,
    Member,
    backoff_s,
)


def member(rank: int, key: str = "a", size: int = 2) -> Member:
    return Member(key, rank, size, "node", f"host:{100 + rank}" if rank == 0 else "")


def failure(kind="killed", rank=1, text="by SIGKILL") -> Failure:
    return Failure(rank, "node", kind, text)


def met(generations: Generations, key: str = "a", size: int = 2, now: float = 0.0) -> Generations:
    for rank in range(size):
        generations.meet(member(rank, key, size), now)
    return generations


def test_all_must_be_there():
    found = Generations(3)
    found.meet(member(1), 0)
    assert found.rendezvous(0) is None
    found.meet(member(0), 0)
    assert found.rendezvous(0) == "host:100" and found.generation == 0


def test_a_failure_makes_all_meet_again_at_once():
    found = met(Generations(3))
    found.failed(0, failure(), 5.0)
    assert found.decide(5.0) == failure()
    assert found.generation == 1 and found.rendezvous(5.0) is None
    assert found.decide(5.0) is None, "one failure, one decision"
    assert met(found, now=5.0).rendezvous(5.0) == "host:100"
    assert found.after == "worker 1 on node node: killed (by SIGKILL)"


def test_late_news_of_a_generation_that_is_over_counts_nothing():
    found = met(Generations(3))
    found.failed(0, failure(), 0)
    found.decide(0)
    found.failed(0, failure("peer", rank=0, text="Connection closed by peer"), 0.1)
    assert found.decide(9) is None and found.generation == 1


def test_who_only_lost_a_peer_is_not_the_cause():
    found = met(Generations(3))
    found.failed(0, failure("peer", 0, "Connection closed by peer"), 1.0)
    assert found.decide(1.0) is None, "the peer may still be heard of"
    found.failed(0, failure(), 1.2)
    assert found.decide(1.2) == failure()
    lonely = met(Generations(3))
    lonely.failed(0, failure("peer", 0), 1.0)
    assert lonely.decide(1.0 + SETTLE_S) == failure("peer", 0)


def test_the_budget_is_refilled_by_a_checkpoint():
    found = met(Generations(2))
    for number in range(12):
        found.failed(found.generation, failure(text=str(number)), 0)
        found.decide(0)
        assert found.error is None
        if number % 2:
            found.progressed()
    for number in range(3):
        found.failed(found.generation, failure(text=str(number)), 0)
        found.decide(0)
    assert str(found.error) == (
        "gave up after cluster.max_failures=2 restarts without a new checkpoint in between (worker 1 on node node: killed "
        "(2)); what was committed is kept; the same command goes on from there"
    )


def test_without_limit():
    found = met(Generations(-1))
    for number in range(100):
        found.failed(found.generation, failure(), 0)
        found.decide(0)
        assert found.error is None, number


def test_what_comes_back_at_once_is_not_tried_a_third_time():
    for kind, ends in (
        ("error", True),
        ("out of memory", True),
        ("crash", True),
        ("killed", False),
        ("storage", False),
    ):
        found = met(Generations(9))
        for _ in range(2):
            found.failed(found.generation, failure(kind, text="KeyError: 'x'"), 0)
            found.decide(0)
        assert (found.error is not None) == ends, kind
    found = met(Generations(9))
    for text in ("one", "other"):
        found.failed(found.generation, failure("error", text=text), 0)
        found.decide(0)
    assert found.error is None


def test_a_supervisor_that_was_replaced_stays_out():
    found = met(Generations(3))
    found.meet(member(0, "b"), 1)
    assert found.is_replaced("a") and not found.is_replaced("b") and found.generation == 1
    found.meet(member(1, "a"), 1)
    assert found.rendezvous(9) is None, "the returned zombie is no member"
    found.meet(member(1, "b"), 1)
    assert found.rendezvous(9) == "host:100" and "lost" in found.after


def test_workers_of_two_groups_are_never_mixed():
    """One of the old workers lives on after its peer was lost, and waits; the new ones come in any order."""
    for first, second in ((0, 1), (1, 0)):
        found = met(Generations(1))
        found.failed(0, failure("peer", 0), 1.0)
        assert found.decide(9.0) is not None
        found.meet(member(0), 9.0)
        found.meet(member(first, "b"), 10.0)
        assert found.is_replaced("a") and not found.is_replaced("b")
        found.meet(member(0), 10.5)
        found.meet(member(second, "b"), 11.0)
        assert not found.is_replaced("b") and found.rendezvous(11.0) == "host:100"
        assert found.error is None and "a worker or its node was lost" in found.after, (
            "one loss, one failure"
        )


def test_groups_that_never_come_together_use_the_budget_up():
    found = met(Generations(2))
    for key in "bc":
        found.meet(member(1, key), 1)
    assert found.error is None
    found.meet(member(1, "d"), 1)
    assert "gave up after cluster.max_failures=2" in str(found.error)


def test_other_sizes_are_other_workers_and_more_of_them_are_no_failure():
    found = met(Generations(0), size=2)
    found.meet(member(2, "b", size=3), 1)
    assert found.error is None and found.after == "planned: more workers came"
    met(found, "b", 3)
    found.meet(member(0, "c", size=2), 2)
    assert found.error is not None and "a worker or its node was lost" in str(found.error)


def test_a_node_that_was_announced_to_go_is_no_failure():
    told = "planned: node abc (worker 2) was taken away, as announced"
    for peers_first in (False, True):
        found = met(Generations(0), size=3)
        found.going("node abc (worker 2)")
        if peers_first:
            found.failed(0, failure("peer", 0), 1)
            found.decide(9)
            found.meet(member(0, size=3), 9)
        met(found, "b", 2)
        assert found.error is None and found.after == told
        found.failed(found.generation, failure(), 10)
        assert found.decide(10) == failure() and found.error is not None, (
            "what fails by itself counts"
        )
    found = met(Generations(0), size=3)
    found.going("node abc (worker 2)")
    for key in "bc":
        met(found, key, 2)
    assert found.error is not None and "a worker or its node was lost" in found.after, (
        "it goes once"
    )


def test_starts_are_spaced_out_more_and_more():
    found = [backoff_s(count) for count in range(1, 12)]
    assert found[0] == 0 and found == sorted(found) and found[-1] == MOST_BACKOFF_S
    held = met(Generations(-1))
    for _ in range(3):
        held.failed(held.generation, failure(), 10)
        held.decide(10)
    met(held, now=10)
    assert held.rendezvous(10) is None and held.rendezvous(10 + backoff_s(3)) == "host:100"


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from("abcd")), max_size=40))
def test_who_was_replaced_is_in_no_generation(events):
    """Whatever the order in which supervisors of four sets of workers come."""
    found = Generations(-1)
    for now, (rank, key) in enumerate(events):
        found.meet(member(rank, key, 3), now)
        there = found._members.values()
        if found.rendezvous(now + 10**6) is not None:
            assert {own.rank for own in there} == {0, 1, 2}
        assert not any(found.is_replaced(own.group) for own in there)
