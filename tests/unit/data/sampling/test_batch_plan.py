"""The batch plan: each sequence once an epoch of its source; depends on counts, config and step only."""

import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.data.data_helpers import batch_section, data_section

from dist_ft.config.schema import ScheduleSection
from dist_ft.data.sampling.batch_plan import BatchPlan
from dist_ft.data.sampling.mixture import Mixture


def plan_of(counts, seed=0, global_batch=4, micro_batch=1, **data):
    """Return a plan over blocks of `counts` sequences: one list, or one for each source."""
    sources = counts if isinstance(counts[0], list) else [list(counts)]
    section = data_section(**{"train": [f"s{i}" for i in range(len(sources))], **data})
    flat = np.array([count for source in sources for count in source])
    numbers = np.array([i for i, source in enumerate(sources) for _ in source])
    return BatchPlan(
        flat,
        numbers,
        section,
        batch_section(global_batch=global_batch, micro_batch=micro_batch),
        seed,
    )


def walk(plan, steps, first=0):
    return [
        [plan.sequence_refs(step, lane) for lane in range(plan.num_lanes)]
        for step in range(first, first + steps)
    ]


COUNTS = st.lists(st.integers(0, 9), min_size=1, max_size=25).filter(sum)
CASES = st.tuples(
    COUNTS,
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(1, 12),
    st.booleans(),
    st.integers(0, 2**63 - 1),
)


@settings(max_examples=100, deadline=None)
@given(CASES)
def test_each_sequence_occurs_once_an_epoch(case):
    """Each sequence occurs exactly once in each of two epochs; only the last step is partial."""
    counts, lanes, size, window, shuffle, seed = case
    plan = plan_of(counts, seed, lanes * size, size, shuffle=shuffle, shuffle_blocks=window)
    all_sequences = [(block, i) for block, count in enumerate(counts) for i in range(count)]
    steps = plan.num_steps_in_epochs(1)
    for epoch in range(2):
        walked = walk(plan, steps, first=epoch * steps)
        refs = [ref for step in walked for lane in step for ref in lane]
        assert sorted((ref.block, ref.sequence) for ref in refs) == all_sequences
        assert {ref.epoch for ref in refs} == {epoch}
        assert all(len(lane) == size for step in walked[:-1] for lane in step)
    assert plan.total_steps(ScheduleSection(epochs=2)) == 2 * steps


@settings(max_examples=60, deadline=None)
@given(
    st.lists(COUNTS, min_size=2, max_size=4),
    st.integers(1, 5),
    st.integers(1, 3),
    st.integers(0, 2**63 - 1),
    st.lists(st.floats(0.01, 10), min_size=4, max_size=4),
)
def test_mixed_sources_occur_once_in_each_of_their_epochs(sources, lanes, size, seed, weights):
    train = [{"path": f"s{i}", "weight": weights[i]} for i in range(len(sources))]
    plan = plan_of(sources, seed, lanes * size, size, train=train)
    seen = {}
    for step in walk(plan, 300):
        for lane in step:
            for ref in lane:
                where = (ref.source, ref.epoch, ref.block, ref.sequence)
                assert where not in seen
                seen[where] = True
    for source, counts in enumerate(sources):
        reached = max((epoch for number, epoch, _, _ in seen if number == source), default=0)
        counts_by_epoch = [
            sum(1 for number, at, _, _ in seen if (number, at) == (source, epoch))
            for epoch in range(reached + 1)
        ]
        # lanes may differ by one round of draws; an epoch further behind is complete
        is_complete = [count == sum(counts) for count in counts_by_epoch]
        num_behind = max(0, reached - 1 - 256 * lanes // max(1, sum(counts)))
        assert all(is_complete[:num_behind]), counts_by_epoch


@given(CASES)
@settings(max_examples=40, deadline=None)
def test_any_step_can_be_planned_first(case):
    """Planning only a late step gives the same as planning all steps: there is no hidden state."""
    counts, lanes, size, window, shuffle, seed = case
    values = {
        "global_batch": lanes * size,
        "micro_batch": size,
        "shuffle": shuffle,
        "shuffle_blocks": window,
    }
    walked = walk(plan_of(counts, seed, **values), 40)
    assert walk(plan_of(counts, seed, **values), 1, first=39) == walked[39:]


def test_any_step_of_mixed_sources_can_be_planned_first():
    sources = [[3, 4], [50], [7] * 5]
    train = [{"path": f"s{i}", "weight": weight} for i, weight in enumerate((1, 2, 0.5))]
    walked = walk(plan_of(sources, train=train), 700)
    assert walk(plan_of(sources, train=train), 5, first=695) == walked[695:]


def test_plan_does_not_depend_on_the_world(monkeypatch):
    expected = walk(plan_of([9] * 30), 50)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "7")
    assert walk(plan_of([9] * 30), 50) == expected


def test_unshuffled_plan_keeps_storage_order():
    plan = plan_of([2, 3, 1], shuffle=False, global_batch=2)
    assert [
        [(ref.block, ref.sequence) for lane in step for ref in lane] for step in walk(plan, 3)
    ] == [[(0, 0), (0, 1)], [(1, 0), (1, 1)], [(1, 2), (2, 0)]]


def test_lane_reads_few_blocks_at_a_time():
    """With as many lanes as shuffled blocks, a lane finishes its part of a block before the next."""
    plan = plan_of([50] * 64, global_batch=16, shuffle_blocks=16)
    for lane in range(16):
        blocks = [ref.block for step in range(200) for ref in plan.sequence_refs(step, lane)]
        changes = sum(a != b for a, b in pairwise(blocks))
        assert changes <= 4 + 1
    alone = plan_of([50] * 64, global_batch=1, shuffle_blocks=16)
    assert len({ref.block for step in range(200) for ref in alone.sequence_refs(step, 0)}) == 16


def test_orders_differ_between_epochs_and_seeds():
    orders = set()
    for seed in range(3):
        plan = plan_of([5] * 40, seed, shuffle_blocks=4)
        for epoch in range(3):
            first = epoch * 50
            orders.add(
                tuple(
                    ref.block
                    for step in walk(plan, 50, first=first)
                    for lane in step
                    for ref in lane
                )
            )
    assert len(orders) == 9


def test_total_steps():
    plan = plan_of([10], global_batch=4)
    assert (
        plan.total_steps(ScheduleSection(epochs=3)) == 9
    )  # ten sequences: two whole steps and a partial one, three times
    assert plan.total_steps(ScheduleSection(steps=100)) == 100
    assert [plan.epoch_and_step(step) for step in (0, 2, 3, 8, 100)] == [
        (0, 0),
        (0, 2),
        (1, 0),
        (2, 2),
        (33, 1),
    ]
    assert plan.epochs_done(3) == [1.0] and plan.min_draws_by_source(8) == [20]
    with pytest.raises(ValueError, match="step=-1: steps count from 0"):
        plan.sequence_refs(-1, 0)


def test_epochs_of_several_sources_and_repeats():
    train = [{"path": "a"}, {"path": "b", "repeat": 2.5}]
    plan = plan_of([[10], [4]], global_batch=4, train=train)
    assert [plan.num_steps_in_epochs(n) for n in range(4)] == [0, 5, 10, 15]
    refs = [
        ref for step in walk(plan, plan.num_steps_in_epochs(2)) for lane in step for ref in lane
    ]
    assert len(refs) == len(set(refs)) == 40
    assert plan.min_draws_by_source(plan.num_steps_in_epochs(2)) == [20, 20] and plan.epochs_done(
        plan.num_steps_in_epochs(2)
    ) == [
        2.0,
        5.0,
    ]


def test_blocks_after_follow_the_order_of_the_epoch():
    plan = plan_of([10] * 8, global_batch=1, shuffle_blocks=1)
    order = [ref.block for step in range(80) for ref in plan.sequence_refs(step, 0)][::10]
    (ref,) = plan.sequence_refs(20, 0)
    assert plan.blocks_after(ref, 2) == order[2:5]


def test_cost_does_not_grow_with_samples():
    """100 M samples of 1.4 kB are some 9,000 blocks; planning any step is arithmetic."""
    plan = plan_of([2000] * 9000, global_batch=16384, micro_batch=1)
    started = time.perf_counter()
    plan.sequence_refs(900, 5000)
    assert time.perf_counter() - started < 1


def test_concurrent_threads_see_the_same_epochs(monkeypatch):
    def quarter():  # epochs of 1, 1, 1 and 2 steps
        return plan_of([5, 9, 3], train=[{"path": "s", "repeat": 0.25}])

    alone, plan, num_draws = quarter(), quarter(), Mixture.num_draws
    monkeypatch.setattr(
        Mixture, "num_draws", lambda self, epoch: (time.sleep(0.001), num_draws(self, epoch))[1]
    )
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(plan.num_steps_in_epochs, [20] * 4))
    assert [plan.num_steps_in_epochs(epoch) for epoch in range(21)] == [
        alone.num_steps_in_epochs(epoch) for epoch in range(21)
    ]


@settings(max_examples=80, deadline=None)
@given(CASES, st.integers(2, 5))
def test_bucketed_sequences_occur_once_an_epoch(case, size):
    """With `data.bucket`, each sequence still occurs once an epoch."""
    counts, lanes, _, window, shuffle, seed = case
    plan = plan_of(
        counts,
        seed,
        lanes * size,
        size,
        shuffle=shuffle,
        shuffle_blocks=window,
        bucket=8,
        pack=False,
    )
    all_sequences = [(block, i) for block, count in enumerate(counts) for i in range(count)]
    for epoch in range(2):
        refs = [
            ref
            for step in walk(
                plan, plan.num_steps_in_epochs(1), first=epoch * plan.num_steps_in_epochs(1)
            )
            for lane in step
            for ref in lane
        ]
        assert sorted((ref.block, ref.sequence) for ref in refs) == all_sequences


def test_micro_batches_hold_neighbors_of_one_bucket():
    plan = plan_of([64, 64, 64], 5, 8, 4, bucket=8, pack=False)
    lanes = [lane for step in walk(plan, plan.num_steps_in_epochs(1)) for lane in step]
    whole = [
        lane
        for lane in lanes
        if len({ref.block for ref in lane}) == 1
        and [ref.sequence for ref in lane] == list(range(lane[0].sequence, lane[0].sequence + 4))
    ]
    assert len(whole) == len(lanes) == 48
    assert [lane[0].sequence for lane in lanes[:16]] != sorted(
        lane[0].sequence for lane in lanes[:16]
    ), "micro-batches are shuffled"
