"""The loader: targets stay within their sample, batches within their lane, and threads end."""

import threading
import time

import numpy as np
import pytest
from unit.data.data_helpers import batch_section, chat

from dist_ft.core.errors import DataError
from dist_ft.data.batch import IGNORED
from dist_ft.data.batching import loader as module
from dist_ft.data.batching.loader import assemble

ROWS = [chat(f"q {i}", "the fox " * (1 + i % 5), "and", f"{i}") for i in range(30)]


@pytest.fixture
def loader(make_loader):
    return make_loader(ROWS)


def threads():
    return [thread for thread in threading.enumerate() if "dist_ft-loader" in thread.name]


def test_assembled_by_hand():
    """Two samples in row 0, one in row 1: shifted within each, padded to the longest row."""
    tokens = np.array([10, 11, 12, 20, 21, 30, 31], dtype=np.int32)
    learned = np.array([0, 1, 1, 1, 1, 0, 1], dtype=np.uint8)
    pieces = np.array([[7, 0, 3, 0], [2, 4, 2, 0], [5, 0, 2, 1]])
    batch = assemble(tokens, learned, pieces, np.array([0, 0, 1]), lane=3)
    assert batch.input_ids.tolist() == [[10, 11, 12, 20, 21], [30, 31, 0, 0, 0]]
    assert batch.target_ids.tolist() == [
        [11, 12, IGNORED, 21, IGNORED],
        [31, IGNORED, IGNORED, IGNORED, IGNORED],
    ]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]]
    assert (batch.num_target_tokens, batch.num_tokens, batch.lane) == (4, 7, 3)
    assert {array.dtype for array in (batch.input_ids, batch.target_ids, batch.position_ids)} == {
        np.dtype(np.int64)
    }


def test_targets_are_those_of_the_samples(loader):
    """Every piece, found again in the batches, is its tokens, and its targets are these one further where learned."""
    seen = []
    for step in range(loader.steps_of_a_pass):
        for lane, batch in enumerate(loader.batches(step, range(2))):
            pieces = iter(batch.pieces.tolist())
            for row, slot in enumerate(loader.plan.slots(step, lane)):
                column = 0
                for _ in loader.packed(slot.epoch, slot.block).sequence(slot.sequence):
                    sample, first, size, _ = next(pieces)
                    tokenised = loader.store.block(slot.block)
                    start = (
                        int(tokenised.offsets[sample - loader.index.first_samples[slot.block]])
                        + first
                    )
                    tokens, learned = (
                        array[start : start + size]
                        for array in (tokenised.tokens, tokenised.targets)
                    )
                    at = slice(column, column + size)
                    assert np.array_equal(batch.input_ids[row, at], tokens)
                    assert batch.position_ids[row, at].tolist() == list(range(size))
                    assert batch.target_ids[row, at].tolist() == [
                        *np.where(learned[1:], tokens[1:], IGNORED).tolist(),
                        IGNORED,
                    ]
                    column = at.stop
                    seen.append(sample)
                assert (batch.target_ids[row, column:] == IGNORED).all()
            assert next(pieces, None) is None
    assert sorted(seen) == list(range(30))


def test_lanes_are_the_same_in_any_world(loader):
    whole = loader.batches(0, range(2))
    for lane in range(2):
        alone = loader.batches(0, [lane])[0]
        assert alone.lane == lane and np.array_equal(alone.input_ids, whole[lane].input_ids)
        assert np.array_equal(alone.target_ids, whole[lane].target_ids)


def test_absent_lane_is_an_empty_batch(make_loader):
    loader = make_loader(ROWS[:3], pack=False)
    assert sorted(batch.input_ids.shape[0] for batch in loader.batches(0, range(2))) == [1, 2]
    loader = make_loader(ROWS[:1], pack=False)
    empty = loader.batches(0, range(2))[1]
    assert (empty.lane, empty.num_target_tokens, empty.num_tokens) == (1, 0, 0)


def test_split_text_is_learned_across_all_pieces(make_loader):
    loader = make_loader(
        [{"text": "the quick brown fox jumps " * 40}],
        batch_section(sequence_length=32),
        overlong="split",
    )
    batches = [b for step in range(loader.steps_of_a_pass) for b in loader.batches(step, range(2))]
    length, pieces = int(loader.store.block(0).offsets[-1]), loader.index.total("num_pieces")
    assert sum(batch.num_tokens for batch in batches) == length
    assert sum(batch.num_target_tokens for batch in batches) == length - pieces


@pytest.mark.parametrize("values", [{}, {"pack": False}, {"shuffle": False}, {"block_mib": 1}])
def test_all_targets_of_the_index_come_once(make_loader, values):
    loader = make_loader(ROWS, **values)
    batches = [b for step in range(loader.steps_of_a_pass) for b in loader.batches(step, range(2))]
    assert sum(batch.num_target_tokens for batch in batches) == loader.index.total("num_targets")
    assert sum(batch.num_tokens for batch in batches) == loader.index.total("num_tokens")


def test_epochs_are_recorded_with_the_pieces(make_loader):
    loader = make_loader(ROWS)
    steps = 2 * loader.steps_of_a_pass
    pieces = np.concatenate(
        [b.pieces for step in range(steps) for b in loader.batches(step, range(2))]
    )
    for epoch in range(2):
        assert sorted(pieces[pieces[:, 3] == epoch, 0].tolist()) == list(range(30))


def test_an_index_that_does_not_fit_the_blocks_is_refused(make_loader):
    from dataclasses import replace

    loader = make_loader(ROWS)
    measures = tuple(
        replace(found, num_sequences=found.num_sequences + 1) for found in loader.index.measures
    )
    loader.index = replace(loader.index, measures=measures)
    with pytest.raises(
        DataError,
        match=r"makes \d+ sequences, the run's index says \d+; the index was made by another",
    ):
        loader.batches(0, range(2))


def test_iterate_equals_batches(loader):
    stop = loader.steps_of_a_pass + 3
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


def test_closing_does_not_wait_for_a_block_that_is_being_made(loader, monkeypatch):
    begun_to_wait, made, direct = threading.Event(), threading.Event(), loader.batches
    monkeypatch.setattr(module, "CLOSE_S", 0.2)
    monkeypatch.setattr(
        loader,
        "batches",
        lambda step, lanes: (
            direct(step, lanes) if not step else (begun_to_wait.set(), made.wait(20))
        ),
    )
    stream = loader.iterate(0, 10, range(2))
    next(stream)
    assert begun_to_wait.wait(5)
    (thread,) = threads()
    begun = time.monotonic()
    stream.close()
    assert time.monotonic() - begun < 5 and thread.is_alive()
    made.set()
    thread.join(5)
    assert not thread.is_alive()


def test_no_more_blocks_are_open_than_files_may_be(make_loader, monkeypatch):
    monkeypatch.setattr(module, "most_open", lambda wanted: min(wanted, 3))
    assert make_loader(ROWS).store.most_open == 3
