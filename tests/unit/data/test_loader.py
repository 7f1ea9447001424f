"""The loader: targets stay within their sample, batches within their lane, and threads end."""

import threading

import numpy as np
import pytest
from unit.data.data_helpers import batch_section, chat

from dist_ft.data.batch import IGNORED
from dist_ft.data.index import build
from dist_ft.data.loader import Loader, assemble
from dist_ft.data.plan import Plan
from dist_ft.errors import DataError
from dist_ft.world import Collectives, World

ROWS = [chat(f"q {i}", "the fox " * (1 + i % 5), "and", f"{i}") for i in range(30)]


@pytest.fixture
def loader(make):
    return loader_of(make, ROWS)


def loader_of(make, rows, batch=None, seed=0, **values):
    shards, cache = make(rows, **values)
    batch = batch or batch_section(sequence_length=128)
    index = build(shards, cache, cache.encoder.data, batch.sequence_length, World(), Collectives())
    return Loader(Plan(index, cache.encoder.data, batch, seed), index, cache, batch)


def threads():
    return [thread for thread in threading.enumerate() if "dist_ft-loader" in thread.name]


def test_assembled_by_hand():
    """Two samples in row 0, one in row 1: shifted within each, padded to the longest row."""
    tokens = np.array([10, 11, 12, 20, 21, 30, 31], dtype=np.int32)
    learned = np.array([0, 1, 1, 1, 1, 0, 1], dtype=np.uint8)
    pieces = np.array([[7, 0, 3], [2, 4, 2], [5, 0, 2]])
    batch = assemble(tokens, learned, pieces, np.array([0, 0, 1]), lane=3)
    assert batch.input_ids.tolist() == [[10, 11, 12, 20, 21], [30, 31, 0, 0, 0]]
    assert batch.target_ids.tolist() == [[11, 12, IGNORED, 21, IGNORED], [31, IGNORED, IGNORED, IGNORED, IGNORED]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]]
    assert (batch.num_target_tokens, batch.num_tokens, batch.lane) == (4, 7, 3)
    assert {array.dtype for array in (batch.input_ids, batch.target_ids, batch.position_ids)} == {np.dtype(np.int64)}


def test_targets_are_those_of_the_samples(loader):
    """Every piece's targets, found again in the batches, are its tokens one further where these are learned."""
    seen = []
    for step in range(loader.plan.steps_in_epoch(0)):
        batches = loader.batches(step, range(2))
        assert sum(batch.num_target_tokens for batch in batches) == loader.plan.num_target_tokens(step)
        for batch in batches:
            row, column = 0, 0
            for sample, first, size in batch.pieces.tolist():
                if column + size > 128 or (column and batch.position_ids[row, column] != 0) or (
                        column + size > batch.input_ids.shape[1]):
                    row, column = row + 1, 0
                shard, line = loader.index.place(sample)
                tokenised = loader.cache.shard(shard)
                start = int(tokenised.offsets[line]) + first
                tokens, learned = (array[start:start + size] for array in (tokenised.tokens, tokenised.targets))
                at = slice(column, column + size)
                if not np.array_equal(batch.input_ids[row, at], tokens):
                    row, column, at = row + 1, 0, slice(0, size)
                assert np.array_equal(batch.input_ids[row, at], tokens)
                assert batch.position_ids[row, at].tolist() == list(range(size))
                assert batch.target_ids[row, at].tolist() == [
                    *np.where(learned[1:], tokens[1:], IGNORED).tolist(), IGNORED]
                column = at.stop
                seen.append(sample)
    assert sorted(seen) == list(range(30))


def test_lanes_are_the_same_in_any_world(loader):
    whole = loader.batches(0, range(2))
    for lane in range(2):
        alone = loader.batches(0, [lane])[0]
        assert alone.lane == lane and np.array_equal(alone.input_ids, whole[lane].input_ids)
        assert np.array_equal(alone.target_ids, whole[lane].target_ids)


def test_absent_lane_is_an_empty_batch(make):
    loader = loader_of(make, ROWS[:3], pack=False)
    full, partial = loader.batches(0, range(2))
    assert full.input_ids.shape[0] == 2 and partial.input_ids.shape[0] == 1
    loader = loader_of(make, ROWS[:2], pack=False)
    empty = loader.batches(0, range(2))[1]
    assert (empty.lane, empty.num_target_tokens, empty.num_tokens) == (1, 0, 0)


def test_split_text_is_learned_across_all_pieces(make):
    loader = loader_of(make, [{"text": "the quick brown fox jumps " * 40}], batch_section(sequence_length=32),
                       overlong="split")
    index = loader.index
    batches = [b for step in range(loader.plan.steps_in_epoch(0)) for b in loader.batches(step, range(2))]
    assert sum(batch.num_tokens for batch in batches) == index.lengths[0]
    assert sum(batch.num_target_tokens for batch in batches) == index.lengths[0] - index.num_pieces


def test_iterate_equals_batches_and_crosses_epochs(loader):
    stop = loader.plan.steps_in_epoch(0) + 3
    found = list(loader.iterate(1, stop, range(2)))
    assert len(found) == stop - 1
    for step, batches in enumerate(found, 1):
        for ahead, direct in zip(batches, loader.batches(step, range(2)), strict=True):
            assert np.array_equal(ahead.input_ids, direct.input_ids)
    assert not threads()


@pytest.mark.parametrize(("start", "stop"), [(0, 0), (3, 2), (0, 1), (0, 2)])
def test_short_iterations(loader, start, stop):
    assert len(list(loader.iterate(start, stop, range(2)))) == max(0, stop - start)


def test_thread_ends_with_the_iterator(loader):
    stream = loader.iterate(0, 1000, range(2))
    next(stream)
    assert len(threads()) == 1
    stream.close()
    assert not threads()


def test_prefetches_two_steps_and_no_more(loader, monkeypatch):
    made = []
    monkeypatch.setattr(loader, "batches", lambda step, lanes: made.append(step))
    stream = loader.iterate(0, 100, range(2))
    next(stream)
    stream.close()
    assert len(made) <= 3


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
