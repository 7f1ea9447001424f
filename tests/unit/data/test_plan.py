"""The plan: every piece once an epoch, in full sequences, whatever the sizes; and nothing but index, config, step."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.data.data_helpers import batch_section, data_section

from dist_ft.config.schema import ScheduleSection
from dist_ft.data.index import Index
from dist_ft.data.plan import Plan, plan_epoch


def index_of(lengths):
    lengths = np.asarray(lengths, dtype=np.int32)
    pieces = np.stack([np.arange(len(lengths)), np.zeros(len(lengths)), lengths], axis=1).astype(np.int64)
    return Index((), np.array([0, len(lengths)]), lengths, lengths - 1, pieces, lengths - 1, {})


def plan_of(lengths, seed=0, global_batch=4, length=64, **data):
    return Plan(index_of(lengths), data_section(**data), batch_section(
        global_batch=global_batch, micro_batch=1, sequence_length=length), seed)


CASES = st.tuples(st.lists(st.integers(2, 64), min_size=1, max_size=120), st.integers(1, 40), st.integers(1, 9),
                  st.booleans(), st.booleans(), st.integers(0, 2**63 - 1))


@settings(max_examples=150, deadline=None)
@given(CASES)
def test_once(case):
    """Every piece exactly once in each of two epochs; no sequence too long; only last steps partial."""
    lengths, window, global_batch, pack, shuffle, seed = case
    plan = plan_of(lengths, seed, global_batch, pack=pack, shuffle=shuffle, packing_window=window)
    step = 0
    for epoch in range(2):
        seen = []
        for within in range(plan.steps_in_epoch(epoch)):
            assert plan.locate(step) == (epoch, within)
            slots = plan.sequences(step)
            assert len(slots) == global_batch and all(slot[:, 2].sum() <= 64 for slot in slots)
            full = [bool(len(slot)) for slot in slots]
            assert full == sorted(full, reverse=True) and full[0]
            assert all(full) or within == plan.steps_in_epoch(epoch) - 1
            assert plan.num_target_tokens(step) == sum(int((slot[:, 2] - 1).sum()) for slot in slots)
            seen += np.concatenate(slots)[:, 0].tolist()
            step += 1
        assert sorted(seen) == list(range(len(lengths)))


@given(CASES)
@settings(max_examples=30, deadline=None)
def test_any_step_first(case):
    """A plan asked for its last step only gives what one asked for all gives: nothing is carried along."""
    lengths, window, global_batch, pack, shuffle, seed = case
    values = {"pack": pack, "shuffle": shuffle, "packing_window": window}
    all_steps = plan_of(lengths, seed, global_batch, **values)
    last = all_steps.total_steps(ScheduleSection(epochs=3)) - 1
    walked = [all_steps.sequences(step) for step in range(last + 1)][-1]
    jumped = plan_of(lengths, seed, global_batch, **values).sequences(last)
    assert all(np.array_equal(a, b) for a, b in zip(walked, jumped, strict=True))


def test_nothing_world_like_goes_in(monkeypatch):
    """Same sequences whatever the environment of a worker says, and however a batch is cut into lanes."""
    lengths = np.random.default_rng(0).integers(2, 64, 300)
    expected = [plan_of(lengths, packing_window=50).sequences(step) for step in range(20)]
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "7")
    other = Plan(index_of(lengths), data_section(packing_window=50), batch_section(
        global_batch=4, micro_batch=4, sequence_length=64), 0)
    for step, slots in enumerate(expected):
        assert all(np.array_equal(a, b) for a, b in zip(slots, other.sequences(step), strict=True))


def test_unshuffled_unpacked_lies_in_order():
    plan = plan_of([5, 6, 7, 8, 9], pack=False, shuffle=False, global_batch=2)
    assert [[slot[:, 0].tolist() for slot in plan.sequences(step)] for step in range(3)] == [
        [[0], [1]], [[2], [3]], [[4], []]]


def test_unshuffled_packed_follows_first_samples():
    plan = plan_of([10, 60, 54, 4], pack=True, shuffle=False, global_batch=3)
    assert [slot[:, 0].tolist() for slot in plan.sequences(0)] == [[0, 2], [1, 3], []]


def test_epochs_and_seeds_differ():
    lengths = np.random.default_rng(0).integers(2, 64, 300)
    members = {plan_epoch(lengths, data_section(), 64, seed, epoch).members.tobytes()
               for seed in range(3) for epoch in range(3)}
    assert len(members) == 9


def test_long_sequences_do_not_come_first():
    lengths = np.concatenate([np.full(100, 64), np.full(1000, 6)])
    plan = plan_epoch(lengths, data_section(), 64, 0, 0)
    pieces = np.diff(plan.offsets)
    assert abs((pieces[:100] == 1).mean() - (pieces == 1).mean()) < 0.2


def test_total_steps():
    plan = plan_of([10] * 10, pack=False, global_batch=4)
    assert plan.total_steps(ScheduleSection(epochs=3)) == 9
    assert plan.total_steps(ScheduleSection(steps=100)) == 100
    assert plan.locate(8) == (2, 2) and plan.locate(100) == (33, 1)
    with pytest.raises(ValueError, match="step=-1: steps count from 0"):
        plan.locate(-1)


def test_what_the_ledger_records():
    plan = plan_of([10] * 6, pack=False, shuffle=False, global_batch=4)
    assert plan.samples_seen(1)[:, 0].tolist() == [4, 5] and plan.samples_seen(1).shape == (2, 3)


def test_fill_of_packed_sequences():
    lengths = np.clip(np.random.default_rng(0).lognormal(np.log(350), 1, 4 * 4096).astype(int), 2, 2048)
    plan = plan_epoch(lengths, data_section(), 2048, 0, 0)
    assert lengths.sum() / (plan.num_sequences * 2048) >= 0.98


def test_a_million_samples_in_seconds():
    lengths = np.clip(np.random.default_rng(0).lognormal(np.log(350), 1, 1_000_000).astype(int), 2, 2048)
    start = time.perf_counter()
    plan = plan_epoch(lengths, data_section(), 2048, 0, 0)
    assert plan.num_sequences > 1000 and time.perf_counter() - start < 20
