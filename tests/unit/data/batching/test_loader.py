"""The loader: targets stay within their sample, batches within their lane, and threads end."""

import threading
import time

import numpy as np
import pytest
from unit.data.data_helpers import batch_section, chat

from dist_ft.core.errors import DataError
from dist_ft.data.batch import IGNORE_INDEX
from dist_ft.data.batching import loader as module
from dist_ft.data.batching import prefetch
from dist_ft.data.batching.assemble import assemble_batch

ROWS = [chat(f"q {i}", "the fox " * (1 + i % 5), "and", f"{i}") for i in range(30)]


@pytest.fixture
def loader(make_loader):
    return make_loader(ROWS)


def threads():
    return [thread for thread in threading.enumerate() if "dist_ft-loader" in thread.name]


def test_assembled_batch_is_shifted_and_padded():
    """Two samples in row 0, one in row 1: shifted within each, padded to the longest row."""
    tokens = np.array([10, 11, 12, 20, 21, 30, 31], dtype=np.int32)
    is_target = np.array([0, 1, 1, 1, 1, 0, 1], dtype=np.uint8)
    segments = np.array([[7, 0, 3, 0], [2, 4, 2, 0], [5, 0, 2, 1]])
    batch = assemble_batch(tokens, is_target, segments, np.array([0, 0, 1]), lane=3)
    assert batch.input_ids.tolist() == [[10, 11, 12, 20, 21], [30, 31, 0, 0, 0]]
    assert batch.target_ids.tolist() == [
        [11, 12, IGNORE_INDEX, 21, IGNORE_INDEX],
        [31, IGNORE_INDEX, IGNORE_INDEX, IGNORE_INDEX, IGNORE_INDEX],
    ]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]]
    assert (batch.num_target_tokens, batch.num_tokens, batch.lane) == (4, 7, 3)
    assert {array.dtype for array in (batch.input_ids, batch.target_ids, batch.position_ids)} == {
        np.dtype(np.int64)
    }


def test_batches_hold_tokens_and_targets_of_their_segments(loader):
    """Each segment has its block's tokens; its targets are the next tokens where marked."""
    seen = []
    for step in range(loader.steps_per_epoch):
        for lane, batch in enumerate(loader.batches(step, range(2))):
            segments = iter(batch.segments.tolist())
            for row, ref in enumerate(loader.plan.sequence_refs(step, lane)):
                column = 0
                for _ in loader.packed(ref.epoch, ref.block).sequence(ref.sequence):
                    sample, first, size, _ = next(segments)
                    block = loader.store.block(ref.block)
                    start = (
                        int(block.offsets[sample - loader.index.first_samples[ref.block]]) + first
                    )
                    tokens, is_target = (
                        array[start : start + size] for array in (block.tokens, block.targets)
                    )
                    at = slice(column, column + size)
                    assert np.array_equal(batch.input_ids[row, at], tokens)
                    assert batch.position_ids[row, at].tolist() == list(range(size))
                    assert batch.target_ids[row, at].tolist() == [
                        *np.where(is_target[1:], tokens[1:], IGNORE_INDEX).tolist(),
                        IGNORE_INDEX,
                    ]
                    column = at.stop
                    seen.append(sample)
                assert (batch.target_ids[row, column:] == IGNORE_INDEX).all()
            assert next(segments, None) is None
    assert sorted(seen) == list(range(30))


def test_lanes_are_the_same_in_any_world(loader):
    whole = loader.batches(0, range(2))
    for lane in range(2):
        alone = loader.batches(0, [lane])[0]
        assert alone.lane == lane and np.array_equal(alone.input_ids, whole[lane].input_ids)
        assert np.array_equal(alone.target_ids, whole[lane].target_ids)


def test_lane_without_sequences_gets_an_empty_batch(make_loader):
    loader = make_loader(ROWS[:3], pack=False)
    assert sorted(batch.input_ids.shape[0] for batch in loader.batches(0, range(2))) == [1, 2]
    loader = make_loader(ROWS[:1], pack=False)
    empty = loader.batches(0, range(2))[1]
    assert (empty.lane, empty.num_target_tokens, empty.num_tokens) == (1, 0, 0)


def test_split_text_has_targets_in_all_segments(make_loader):
    loader = make_loader(
        [{"text": "the quick brown fox jumps " * 40}],
        batch_section(sequence_length=32),
        overlong="split",
    )
    batches = [b for step in range(loader.steps_per_epoch) for b in loader.batches(step, range(2))]
    length, segments = int(loader.store.block(0).offsets[-1]), loader.index.total("num_segments")
    assert sum(batch.num_tokens for batch in batches) == length
    assert sum(batch.num_target_tokens for batch in batches) == length - segments


@pytest.mark.parametrize("values", [{}, {"pack": False}, {"shuffle": False}, {"block_mib": 1}])
def test_all_targets_of_the_index_occur_once(make_loader, values):
    loader = make_loader(ROWS, **values)
    batches = [b for step in range(loader.steps_per_epoch) for b in loader.batches(step, range(2))]
    assert sum(batch.num_target_tokens for batch in batches) == loader.index.total("num_targets")
    assert sum(batch.num_tokens for batch in batches) == loader.index.total("num_tokens")


def test_segments_record_their_epoch(make_loader):
    loader = make_loader(ROWS)
    steps = 2 * loader.steps_per_epoch
    segments = np.concatenate(
        [b.segments for step in range(steps) for b in loader.batches(step, range(2))]
    )
    for epoch in range(2):
        assert sorted(segments[segments[:, 3] == epoch, 0].tolist()) == list(range(30))


def test_index_that_does_not_match_the_blocks_is_refused(make_loader):
    from dataclasses import replace

    loader = make_loader(ROWS)
    block_stats = tuple(
        replace(found, num_sequences=found.num_sequences + 1) for found in loader.index.block_stats
    )
    loader.index = replace(loader.index, block_stats=block_stats)
    with pytest.raises(
        DataError,
        match=r"has \d+ sequences, but \d+ in the run's index. Another version built the index",
    ):
        loader.batches(0, range(2))


def test_iterate_equals_batches(loader):
    stop = loader.steps_per_epoch + 3
    found = list(loader.iterate(1, stop, range(2)))
    assert len(found) == stop - 1
    for step, batches in enumerate(found, 1):
        for ahead, direct in zip(batches, loader.batches(step, range(2)), strict=True):
            assert np.array_equal(ahead.input_ids, direct.input_ids)
    assert not threads()


@pytest.mark.parametrize(("start", "stop"), [(0, 0), (3, 2), (0, 1), (0, 2)])
def test_short_iterations_yield_each_step(loader, start, stop):
    assert len(list(loader.iterate(start, stop, range(2)))) == max(0, stop - start)


def test_thread_ends_with_the_iterator(loader):
    stream = loader.iterate(0, 1000, range(2))
    next(stream)
    assert len(threads()) == 1
    stream.close()
    assert not threads()


def test_prefetches_at_most_two_steps(loader, monkeypatch):
    built_steps = []
    monkeypatch.setattr(loader, "batches", lambda step, lanes: built_steps.append(step))
    stream = loader.iterate(0, 100, range(2))
    next(stream)
    stream.close()
    assert len(built_steps) <= 3


def test_errors_of_the_thread_reach_the_consumer(loader, monkeypatch):
    direct = loader.batches

    def failing(step, lanes):
        if step == 2:
            raise DataError("s3://b/x.jsonl: the shard vanished")
        return direct(step, lanes)

    monkeypatch.setattr(loader, "batches", failing)
    stream = loader.iterate(0, 10, range(2))
    assert len(next(stream)) == len(next(stream)) == 2
    with pytest.raises(DataError, match="the shard vanished"):
        next(stream)
    assert not threads()


def test_closing_does_not_wait_for_a_block_in_progress(loader, monkeypatch):
    is_waiting, is_done, direct = threading.Event(), threading.Event(), loader.batches
    monkeypatch.setattr(prefetch, "CLOSE_S", 0.2)
    monkeypatch.setattr(
        loader,
        "batches",
        lambda step, lanes: (
            direct(step, lanes) if not step else (is_waiting.set(), is_done.wait(20))
        ),
    )
    stream = loader.iterate(0, 10, range(2))
    next(stream)
    assert is_waiting.wait(5)
    (thread,) = threads()
    started = time.monotonic()
    stream.close()
    assert time.monotonic() - started < 5 and thread.is_alive()
    is_done.set()
    thread.join(5)
    assert not thread.is_alive()


def test_open_blocks_respect_the_limit_of_open_files(make_loader, monkeypatch):
    monkeypatch.setattr(module, "max_open_blocks", lambda requested: min(requested, 3))
    assert make_loader(ROWS).store.max_open_blocks == 3
