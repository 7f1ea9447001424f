"""The index: one answer on every rank, every policy, every refusal."""

import json
from dataclasses import replace

import numpy as np
import pytest
from unit.data.data_helpers import chat, run_ranks

from dist_ft.data import index as module
from dist_ft.data.cache import TokenCache
from dist_ft.data.index import build, load, recipe
from dist_ft.errors import DataError
from dist_ft.storage import Store
from dist_ft.world import Collectives, World

ROWS = [chat(f"q {i}", "the fox " * (1 + i % 5)) for i in range(20)]
TEXTS = [{"text": "the quick fox " * n} for n in (1, 30, 2, 50)]


def alone(shards, cache, length=64):
    return build(shards, cache, cache.encoder.data, length, World(), Collectives())


def same(a, b):
    return (a.shards, a.recipe) == (b.shards, b.recipe) and all(
        np.array_equal(getattr(a, name), getattr(b, name)) for name in module._ARRAYS)


def test_numbers(make):
    shards, cache = make(ROWS)
    index = alone(shards, cache)
    assert (index.num_samples, index.num_pieces, index.num_left_out) == (20, 20, 0)
    assert index.row_offsets.tolist() == [0, 7, 14, 20]
    assert (index.lengths.dtype, index.target_counts.dtype, index.piece_targets.dtype) == (np.int32,) * 3
    assert index.pieces[:, 0].tolist() == list(range(20)) and not index.pieces[:, 1].any()
    assert np.array_equal(index.pieces[:, 2], index.lengths)
    assert np.array_equal(index.piece_targets, index.target_counts)
    assert index.place(13) == (shards[1], 6) and index.place(14) == (shards[2], 0)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_every_world_has_the_same_index(make, tmp_path, size):
    shards, cache = make(ROWS, rows_per_shard=3)
    expected = alone(shards, cache)

    def rank(world, collectives):
        own = TokenCache(tmp_path / f"cache-{world.rank}", cache.encoder, cache.fingerprint)
        made = build(shards, own, cache.encoder.data, 64, world, collectives)
        assert len(list(own.folder.glob("*.safetensors"))) == len(range(world.rank, len(shards), size))
        return made

    for found in run_ranks(size, rank):
        assert same(found, expected)


def test_an_error_of_one_rank_is_raised_on_all(make):
    bad = [*ROWS[:8], chat("a", ""), *ROWS[9:]]
    shards, cache = make(bad, rows_per_shard=4)

    def rank(world, collectives):
        return build(shards, TokenCache(cache.folder, cache.encoder), cache.encoder.data, 64, world, collectives)

    errors = run_ranks(3, rank)
    assert {type(error) for error in errors} == {DataError}
    assert len({str(error) for error in errors}) == 1
    assert "train-00002-of-00005.jsonl row 1: messages[1].content is empty" in str(errors[0])


def test_an_unforeseen_error_does_not_leave_others_waiting(make, monkeypatch):
    shards, cache = make(ROWS)

    def rank(world, collectives):
        own = TokenCache(cache.folder, cache.encoder)
        if world.rank == 1:
            own.shard = lambda shard: 1 / 0
        return build(shards, own, cache.encoder.data, 64, world, collectives)

    for error in run_ranks(2, rank):
        assert isinstance(error, DataError) and "can not be tokenised (ZeroDivisionError" in str(error)


def test_overlong_error(make):
    shards, cache = make(TEXTS, rows_per_shard=2)
    lengths = alone(shards, cache, 1000).lengths
    with pytest.raises(DataError, match=(
            rf"^data.overlong=error: 2 of 4 samples are longer than batch.sequence_length=32 \(longest {lengths[3]} "
            r"tokens, .*train-00001-of-00002.jsonl row 2\); set data.overlong=truncate or drop, or split for text, or "
            r"raise batch.sequence_length$")):
        alone(shards, cache, 32)


def test_overlong_truncate_drop_split(make, caplog):
    shards, cache = make(TEXTS, overlong="truncate")
    lengths = alone(shards, cache).lengths
    assert alone(shards, cache, 32).pieces[:, 2].tolist() == [min(n, 32) for n in lengths]
    shards, cache = make(TEXTS, overlong="drop")
    dropped = alone(shards, cache, 32)
    assert dropped.pieces[:, 0].tolist() == [0, 2] and dropped.num_left_out == 2
    assert caplog.text.count("2 of 4 samples are left out") == 1
    shards, cache = make(TEXTS, overlong="split")
    split = alone(shards, cache, 32)
    assert split.num_left_out == 0
    for sample, length in enumerate(lengths):
        assert split.pieces[split.pieces[:, 0] == sample, 2].sum() >= length - 1


def test_split_is_for_plain_text(make):
    shards, cache = make([ROWS[0], chat("a", "fox " * 50)], overlong="split")
    with pytest.raises(DataError, match=r"data.overlong=split: 1 of 2 samples that are not plain text are longer than "
                                        r"batch.sequence_length=32 .*set data.overlong=truncate or drop or raise"):
        alone(shards, cache, 32)


def test_nothing_to_learn_after_truncation_is_left_out(make, caplog):
    shards, cache = make([chat("word " * 60, "x"), ROWS[0]], overlong="truncate")
    index = alone(shards, cache, 32)
    assert index.pieces[:, 0].tolist() == [1]
    assert "1 of 2 samples are left out: too long, or nothing to learn within batch.sequence_length=32" in caplog.text


def test_nothing_at_all(make):
    shards, cache = make([chat("word " * 60, "x")], overlong="truncate")
    with pytest.raises(DataError, match=r"none of the 1 samples has a token to learn within batch.sequence_length=32"):
        alone(shards, cache, 32)
    with pytest.raises(DataError, match="data: holds no sample; at least one is needed"):
        alone((), cache)


def test_saved_and_loaded(make, tmp_path):
    shards, cache = make(ROWS)
    index, store = alone(shards, cache), Store(str(tmp_path / "run"))
    assert load(store) is None
    index.save(store)
    found = load(store)
    assert same(index, found)
    found.verify_unchanged(shards)
    found.verify_recipe(recipe(cache, cache.encoder.data, 64))


@pytest.mark.parametrize("name", ["index.json", "index.safetensors"])
def test_damaged_index(make, tmp_path, name):
    shards, cache = make(ROWS)
    store = Store(str(tmp_path / "run"))
    alone(shards, cache).save(store)
    store.write(name, store.read(name)[:-9])
    with pytest.raises(DataError, match=r"index.json: the stored index is damaged .*; remove the file"):
        load(store)


def test_index_of_another_format(make, tmp_path):
    shards, cache = make(ROWS)
    store = Store(str(tmp_path / "run"))
    alone(shards, cache).save(store)
    about = json.loads(store.read("index.json"))
    store.write("index.json", json.dumps({**about, "format": 99}).encode())
    with pytest.raises(DataError, match=r"index.json: is of format 99; this version reads 1"):
        load(store)


def test_changed_data_is_refused_by_name(make):
    shards, cache = make(ROWS)
    index = alone(shards, cache)
    other = replace(shards[1], version="2")
    for now, what in [((shards[0], other, shards[2]), f"{other.url} changed since the run began"),
                      (shards[:2], f"{shards[2].url} vanished since the run began"),
                      ((*shards, replace(other, url="/new.jsonl")), "/new.jsonl is new since the run began"),
                      (shards[::-1], "the shards are in another order than when the run began")]:
        with pytest.raises(DataError) as caught:
            index.verify_unchanged(now)
        assert what in str(caught.value) and "restore it, or start a run with another run.name" in str(caught.value)


def test_changed_recipe_is_refused(make):
    shards, cache = make(ROWS)
    index = alone(shards, cache)
    with pytest.raises(DataError, match=r"other tokens than when the run began \(sequence_length was 64, is 65\)"):
        index.verify_recipe({**index.recipe, "sequence_length": 65})


def test_first_samples_only(make):
    shards, cache = make(ROWS)
    index = alone(shards, cache)
    assert index.first(5).pieces[:, 0].tolist() == [0, 1, 2, 3, 4]
    assert index.first(0) is index and index.first(100).num_pieces == 20
