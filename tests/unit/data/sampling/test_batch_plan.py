"""The plan: every sequence once an epoch of its source, whatever the sizes; and nothing but counts, config, step."""

import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.data.data_helpers import batch_section, data_section

from dist_ft.config.schema import ScheduleSection
from dist_ft.data.sampling.batch_plan import Plan
from dist_ft.data.sampling.mixture import Mixture


def plan_of(counts, seed=0, global_batch=4, micro_batch=1, **data):
    """Return a plan over blocks of `counts` sequences: one list, or one for each source."""
    sources = counts if isinstance(counts[0], list) else [list(counts)]
    section = data_section(**{"train": [f"s{i}" for i in range(len(sources))], **data})
    flat = np.array([count for source in sources for count in source])
    numbers = np.array([i for i, source in enumerate(sources) for _ in source])
    return Plan(
        flat,
        numbers,
        section,
        batch_section(global_batch=global_batch, micro_batch=micro_batch),
        seed,
    )


def walk(plan, steps, first=0):
    return [
        [plan.slots(step, lane) for lane in range(plan.num_lanes)]
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
def test_once(case):
    """Every sequence of every block exactly once in each of two epochs; only the last step of an epoch is partial."""
    counts, lanes, size, window, shuffle, seed = case
    plan = plan_of(counts, seed, lanes * size, size, shuffle=shuffle, shuffle_blocks=window)
    everything = [(block, i) for block, count in enumerate(counts) for i in range(count)]
    steps = plan.steps_of(1)
    for epoch in range(2):
        walked = walk(plan, steps, first=epoch * steps)
        slots = [slot for step in walked for lane in step for slot in lane]
        assert sorted((slot.block, slot.sequence) for slot in slots) == everything
        assert {slot.epoch for slot in slots} == {epoch}
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
def test_once_in_every_epoch_of_every_source_when_mixed(sources, lanes, size, seed, weights):
    train = [{"path": f"s{i}", "weight": weights[i]} for i in range(len(sources))]
    plan = plan_of(sources, seed, lanes * size, size, train=train)
    seen = {}
    for step in walk(plan, 300):
        for lane in step:
            for slot in lane:
                where = (slot.source, slot.epoch, slot.block, slot.sequence)
                assert where not in seen
                seen[where] = True
    for source, counts in enumerate(sources):
        reached = max((epoch for number, epoch, _, _ in seen if number == source), default=0)
        held = [
            sum(1 for number, at, _, _ in seen if (number, at) == (source, epoch))
            for epoch in range(reached + 1)
        ]
        # lanes of one round may be apart by a round's draws; an epoch that far behind is whole
        whole = [count == sum(counts) for count in held]
        assert all(whole[: max(0, reached - 1 - 256 * lanes // max(1, sum(counts)))]), held


@given(CASES)
@settings(max_examples=40, deadline=None)
def test_any_step_first(case):
    """A plan asked for its last step only gives what one asked for all gives: nothing is carried along."""
    counts, lanes, size, window, shuffle, seed = case
    values = {
        "global_batch": lanes * size,
        "micro_batch": size,
        "shuffle": shuffle,
        "shuffle_blocks": window,
    }
    walked = walk(plan_of(counts, seed, **values), 40)
    assert walk(plan_of(counts, seed, **values), 1, first=39) == walked[39:]


def test_mixed_sources_any_step_first():
    sources = [[3, 4], [50], [7] * 5]
    train = [{"path": f"s{i}", "weight": weight} for i, weight in enumerate((1, 2, 0.5))]
    walked = walk(plan_of(sources, train=train), 700)
    assert walk(plan_of(sources, train=train), 5, first=695) == walked[695:]


def test_nothing_world_like_goes_in(monkeypatch):
    expected = walk(plan_of([9] * 30), 50)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "7")
    assert walk(plan_of([9] * 30), 50) == expected


def test_unshuffled_lies_in_order():
    plan = plan_of([2, 3, 1], shuffle=False, global_batch=2)
    assert [
        [(slot.block, slot.sequence) for lane in step for slot in lane] for step in walk(plan, 3)
    ] == [[(0, 0), (0, 1)], [(1, 0), (1, 1)], [(1, 2), (2, 0)]]


def test_a_lane_reads_few_blocks_at_a_time():
    """With more lanes than blocks shuffled together, a lane stays in one block until it is done with its part of it."""
    plan = plan_of([50] * 64, global_batch=16, shuffle_blocks=16)
    for lane in range(16):
        blocks = [slot.block for step in range(200) for slot in plan.slots(step, lane)]
        changes = sum(a != b for a, b in pairwise(blocks))
        assert changes <= 4 + 1
    alone = plan_of([50] * 64, global_batch=1, shuffle_blocks=16)
    assert len({slot.block for step in range(200) for slot in alone.slots(step, 0)}) == 16


def test_epochs_and_seeds_differ():
    orders = set()
    for seed in range(3):
        plan = plan_of([5] * 40, seed, shuffle_blocks=4)
        for epoch in range(3):
            first = epoch * 50
            orders.add(
                tuple(
                    slot.block
                    for step in walk(plan, 50, first=first)
                    for lane in step
                    for slot in lane
                )
            )
    assert len(orders) == 9


def test_total_steps():
    plan = plan_of([10], global_batch=4)
    assert (
        plan.total_steps(ScheduleSection(epochs=3)) == 9
    )  # ten sequences: two whole steps and a partial one, thrice
    assert plan.total_steps(ScheduleSection(steps=100)) == 100
    assert [plan.locate(step) for step in (0, 2, 3, 8, 100)] == [
        (0, 0),
        (0, 2),
        (1, 0),
        (2, 2),
        (33, 1),
    ]
    assert plan.epochs_of(3) == [1.0] and plan.drawn_by_all(8) == [20]
    with pytest.raises(ValueError, match="step=-1: steps count from 0"):
        plan.slots(-1, 0)


def test_epochs_of_several_sources_and_repeats():
    train = [{"path": "a"}, {"path": "b", "repeat": 2.5}]
    plan = plan_of([[10], [4]], global_batch=4, train=train)
    assert [plan.steps_of(n) for n in range(4)] == [0, 5, 10, 15]
    slots = [slot for step in walk(plan, plan.steps_of(2)) for lane in step for slot in lane]
    assert len(slots) == len(set(slots)) == 40
    assert plan.drawn_by_all(plan.steps_of(2)) == [20, 20] and plan.epochs_of(plan.steps_of(2)) == [
        2.0,
        5.0,
    ]


def test_what_blocks_come_next():
    plan = plan_of([10] * 8, global_batch=1, shuffle_blocks=1)
    order = [slot.block for step in range(80) for slot in plan.slots(step, 0)][::10]
    (slot,) = plan.slots(20, 0)
    assert plan.blocks_after(slot, 2) == order[2:5]


def test_cost_does_not_grow_with_samples():
    """100 M samples of 1.4 kB are some 9,000 blocks: planning a step anywhere is arithmetic."""
    plan = plan_of([2000] * 9000, global_batch=16384, micro_batch=1)
    begun = time.perf_counter()
    plan.slots(900, 5000)
    assert time.perf_counter() - begun < 1


def test_threads_that_ask_at_once_see_the_same_epochs(monkeypatch):
    def quarter():  # epochs of 1, 1, 1 and 2 steps
        return plan_of([5, 9, 3], train=[{"path": "s", "repeat": 0.25}])

    alone, plan, size = quarter(), quarter(), Mixture.size
    monkeypatch.setattr(
        Mixture, "size", lambda self, epoch: (time.sleep(0.001), size(self, epoch))[1]
    )
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(plan.steps_of, [20] * 4))
    assert [plan.steps_of(epoch) for epoch in range(21)] == [
        alone.steps_of(epoch) for epoch in range(21)
    ]


@settings(max_examples=80, deadline=None)
@given(CASES, st.integers(2, 5))
def test_once_in_micro_batches_of_like_length(case, size):
    """Bucketed: each sequence once an epoch, and but for seams micro-batches are neighbours of one block."""
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
    everything = [(block, i) for block, count in enumerate(counts) for i in range(count)]
    for epoch in range(2):
        slots = [
            slot
            for step in walk(plan, plan.steps_of(1), first=epoch * plan.steps_of(1))
            for lane in step
            for slot in lane
        ]
        assert sorted((slot.block, slot.sequence) for slot in slots) == everything


def test_buckets_are_walked_whole():
    plan = plan_of([64, 64, 64], 5, 8, 4, bucket=8, pack=False)
    lanes = [lane for step in walk(plan, plan.steps_of(1)) for lane in step]
    whole = [
        lane
        for lane in lanes
        if len({slot.block for slot in lane}) == 1
        and [slot.sequence for slot in lane] == list(range(lane[0].sequence, lane[0].sequence + 4))
    ]
    assert len(whole) == len(lanes) == 48
    assert [lane[0].sequence for lane in lanes[:16]] != sorted(
        lane[0].sequence for lane in lanes[:16]
    ), "but shuffled"
