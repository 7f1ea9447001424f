"""Which workers form a generation, which were replaced, and when the run is given up."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from dist_ft.runtime.elastic.restart_policy import (
    HANG_SETTLE_S,
    MAX_BACKOFF_S,
    SETTLE_S,
    Failure,
    RestartPolicy,
    backoff_s,
)
from dist_ft.runtime.elastic.worker_group_state import Member, WorkerGroupState


def member(rank: int, group: str = "a", size: int = 2) -> Member:
    return Member(group, rank, size, "node", f"host:{100 + rank}" if rank == 0 else "")


def failure(kind="killed", rank=1, text="by SIGKILL") -> Failure:
    return Failure(rank, "node", kind, text)


def new_state(max_failures: int) -> WorkerGroupState:
    return WorkerGroupState(RestartPolicy(max_failures))


def join_all(
    state: WorkerGroupState, group: str = "a", size: int = 2, now: float = 0.0
) -> WorkerGroupState:
    for rank in range(size):
        state.join(member(rank, group, size), now)
    return state


def test_rendezvous_needs_all_workers():
    state = new_state(3)
    state.join(member(1), 0)
    assert state.rendezvous(0) is None
    state.join(member(0), 0)
    assert state.rendezvous(0) == "host:100" and state.generation == 0


def test_failure_starts_next_generation_at_once():
    state = join_all(new_state(3))
    state.report_failure(0, failure(), 5.0)
    assert state.check(5.0) == failure()
    assert state.generation == 1 and state.rendezvous(5.0) is None
    assert state.check(5.0) is None, "one failure, one decision"
    assert join_all(state, now=5.0).rendezvous(5.0) == "host:100"
    assert state.reason == "worker 1 on node node: killed (by SIGKILL)"


def test_late_report_of_old_generation_is_ignored():
    state = join_all(new_state(3))
    state.report_failure(0, failure(), 0)
    state.check(0)
    state.report_failure(0, failure("peer", rank=0, text="Connection closed by peer"), 0.1)
    assert state.check(9) is None and state.generation == 1


def test_worker_that_lost_a_peer_is_not_the_cause():
    state = join_all(new_state(3))
    state.report_failure(0, failure("peer", 0, "Connection closed by peer"), 1.0)
    assert state.check(1.0) is None, "the peer may still report"
    state.report_failure(0, failure(), 1.2)
    assert state.check(1.2) == failure()
    alone = join_all(new_state(3))
    alone.report_failure(0, failure("peer", 0), 1.0)
    assert alone.check(1.0 + SETTLE_S) == failure("peer", 0)


def test_checkpoint_refills_the_budget():
    state = join_all(new_state(2))
    for number in range(12):
        state.report_failure(state.generation, failure(text=str(number)), 0)
        state.check(0)
        assert state.error is None
        if number % 2:
            state.report_progress()
    for number in range(3):
        state.report_failure(state.generation, failure(text=str(number)), 0)
        state.check(0)
    assert str(state.error) == (
        "gave up after cluster.max_failures=2 restarts without a new checkpoint in between "
        "(worker 1 on node node: killed (2)); saved checkpoints are kept; run the same command to resume"
    )


def test_no_limit():
    state = join_all(new_state(-1))
    for number in range(100):
        state.report_failure(state.generation, failure(), 0)
        state.check(0)
        assert state.error is None, number


def test_repeated_failure_is_not_retried_a_third_time():
    for kind, gives_up in (
        ("error", True),
        ("out of memory", True),
        ("crash", True),
        ("killed", False),
        ("storage", False),
    ):
        state = join_all(new_state(9))
        for _ in range(2):
            state.report_failure(state.generation, failure(kind, text="KeyError: 'x'"), 0)
            state.check(0)
        assert (state.error is not None) == gives_up, kind
    state = join_all(new_state(9))
    for text in ("one", "other"):
        state.report_failure(state.generation, failure("error", text=text), 0)
        state.check(0)
    assert state.error is None


def test_replaced_supervisor_cannot_join():
    state = join_all(new_state(3))
    state.join(member(0, "b"), 1)
    assert state.is_replaced("a") and not state.is_replaced("b") and state.generation == 1
    state.join(member(1, "a"), 1)
    assert state.rendezvous(9) is None, "a replaced supervisor is no member"
    state.join(member(1, "b"), 1)
    assert state.rendezvous(9) == "host:100" and "lost" in state.reason


def test_groups_are_never_mixed():
    """One of the old workers survives its lost peer and waits; the new ones join in any order."""
    for first, second in ((0, 1), (1, 0)):
        state = join_all(new_state(1))
        state.report_failure(0, failure("peer", 0), 1.0)
        assert state.check(9.0) is not None
        state.join(member(0), 9.0)
        state.join(member(first, "b"), 10.0)
        assert state.is_replaced("a") and not state.is_replaced("b")
        state.join(member(0), 10.5)
        state.join(member(second, "b"), 11.0)
        assert not state.is_replaced("b") and state.rendezvous(11.0) == "host:100"
        assert state.error is None and "a worker or its node was lost" in state.reason, (
            "one loss, one failure"
        )


def test_groups_that_never_complete_use_up_the_budget():
    state = join_all(new_state(2))
    for group in "bc":
        state.join(member(1, group), 1)
    assert state.error is None
    state.join(member(1, "d"), 1)
    assert "gave up after cluster.max_failures=2" in str(state.error)


def test_larger_group_is_no_failure_and_smaller_group_is_one():
    state = join_all(new_state(0), size=2)
    state.join(member(2, "b", size=3), 1)
    assert state.error is None and state.reason == "planned: more workers joined"
    join_all(state, "b", 3)
    state.join(member(0, "c", size=2), 2)
    assert state.error is not None and "a worker or its node was lost" in str(state.error)


def test_announced_node_loss_is_no_failure():
    reason = "planned: node abc (worker 2) was taken away, as announced"
    for peers_first in (False, True):
        state = join_all(new_state(0), size=3)
        state.announce_node_loss("node abc (worker 2)")
        if peers_first:
            state.report_failure(0, failure("peer", 0), 1)
            state.check(9)
            state.join(member(0, size=3), 9)
        join_all(state, "b", 2)
        assert state.error is None and state.reason == reason
        state.report_failure(state.generation, failure(), 10)
        assert state.check(10) == failure() and state.error is not None, "another failure counts"
    state = join_all(new_state(0), size=3)
    state.announce_node_loss("node abc (worker 2)")
    for group in "bc":
        join_all(state, group, 2)
    assert state.error is not None and "a worker or its node was lost" in state.reason, (
        "the announcement explains one loss"
    )


def test_backoff_grows():
    delays = [backoff_s(count) for count in range(1, 12)]
    assert delays[0] == 0 and delays == sorted(delays) and delays[-1] == MAX_BACKOFF_S
    state = join_all(new_state(-1))
    for _ in range(3):
        state.report_failure(state.generation, failure(), 10)
        state.check(10)
    join_all(state, now=10)
    assert state.rendezvous(10) is None and state.rendezvous(10 + backoff_s(3)) == "host:100"


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from("abcd")), max_size=40))
def test_replaced_group_is_in_no_generation(events):
    """In whatever order the supervisors of four groups join."""
    state = new_state(-1)
    for now, (rank, group) in enumerate(events):
        state.join(member(rank, group, 3), now)
        members = state._members.values()
        if state.rendezvous(now + 10**6) is not None:
            assert {own.rank for own in members} == {0, 1, 2}
        assert not any(state.is_replaced(own.group) for own in members)


def test_hang_names_the_workers_that_do_not_report():
    state = join_all(new_state(3), size=4)
    for rank in (0, 2, 3):
        state.report_failure(0, failure("hang", rank, "no progress"), 5.0)
    assert state.check(5.0) is None, "the others may still report"
    cause = state.check(5.0 + HANG_SETTLE_S)
    assert cause.rank == 0
    assert cause.text == "no progress; no sign of life from worker 1 on node node"
    assert state.reason == f"worker 0 on node node: hang ({cause.text})"


def test_hang_that_most_workers_did_not_report_yet_blames_nobody():
    state = join_all(new_state(3), size=4)
    state.report_failure(0, failure("hang", 0, "no progress"), 5.0)
    assert state.check(5.0 + HANG_SETTLE_S).text == "no progress"
    everyone = join_all(new_state(3), size=2)
    for rank in (0, 1):
        everyone.report_failure(0, failure("hang", rank, "no progress"), 5.0)
    assert everyone.check(5.0 + HANG_SETTLE_S).text == "no progress"


def test_loss_that_ray_reported_is_named():
    state = join_all(new_state(3), size=3)
    state.report_lost_workers([2])
    state.join(Member("b", 0, 2, "other", "host:1"), 1.0)
    assert state.reason == "worker 2 on node node: lost (the worker or its node was lost)"
    assert state.workers_on({"node"}) == [] and len(state.workers_on({"other"})) == 1


def test_workers_on_a_node_that_is_left_out_leave_without_a_failure():
    state = join_all(new_state(0), size=2)
    state.announce_node_loss("worker 1 on node node", "is left out")
    state.join(Member("b", 0, 1, "other", "host:1"), 1.0)
    assert state.error is None
    assert state.reason == "planned: worker 1 on node node is left out"
