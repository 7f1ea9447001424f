"""The index: one answer on every rank, every policy, every refusal."""

import json
from dataclasses import replace

import pytest
from unit.data.data_helpers import batch_section, chat, data_section, run_ranks

from dist_ft.config.schema import Source
from dist_ft.core.errors import DataError
from dist_ft.core.world import Collectives, World
from dist_ft.data.batching.loader import Loader
from dist_ft.data.blocks import index_file
from dist_ft.data.blocks.block_store import BlockStore
from dist_ft.data.blocks.index import build, cut_into_blocks, recipe
from dist_ft.data.blocks.index_checks import judge
from dist_ft.data.encoding.chat import Encoder
from dist_ft.data.sampling.batch_plan import Plan
from dist_ft.data.sources.discovery import resolve
from dist_ft.data.tools.write import write_jsonl
from dist_ft.storage.filesystem import Store

ROWS = [chat(f"q {i}", "the fox " * (1 + i % 5)) for i in range(20)]
TEXTS = [{"text": "the quick fox " * n} for n in (1, 30, 2, 50)]


def alone(shards, blocks, length=64, **values):
    index = build(shards, blocks, blocks.encoder.data, length, World(), Collectives(), **values)
    judge(index, blocks.encoder.data, length)
    return index


def test_numbers(make):
    shards, blocks = make(ROWS)
    index = alone(shards, blocks)
    assert (index.num_samples, index.total("num_pieces"), index.total("num_left_out")) == (
        20,
        20,
        0,
    )
    assert index.first_samples[-1] == 20 and len(index.blocks) == len(index.measures) > 2
    lengths = [
        n
        for i in range(len(blocks.blocks))
        for n in (blocks.block(i).offsets[1:] - blocks.block(i).offsets[:-1])
    ]
    assert index.total("num_tokens") == sum(lengths)
    assert index.total("num_targets") == sum(
        int(blocks.block(i).targets.sum()) for i in range(len(blocks.blocks))
    )
    assert [index.place(sample) for sample in range(20)] == [
        (shards[0][sample // 7], sample % 7) for sample in range(20)
    ]


@pytest.mark.parametrize("size", [1, 2, 5])
def test_every_world_has_the_same_index(make, tmp_path, size):
    shards, blocks = make(ROWS, rows_per_shard=3)
    expected = alone(shards, blocks)
    data = blocks.encoder.data

    def rank(world, collectives):
        assert cut_into_blocks(shards, data, world, collectives) == blocks.blocks
        own = BlockStore(tmp_path / f"cache-{world.rank}", blocks.encoder, shards[0], blocks.blocks)
        made = build(shards, own, data, 64, world, collectives)
        return made, len(list(own.folder.glob("*.safetensors")))

    results = run_ranks(size, rank)
    assert all(found == expected for found, _ in results)
    assert sum(count for _, count in results) == len(blocks.blocks), "each block on one rank"


def test_an_error_of_one_rank_is_raised_on_all(make):
    shards, blocks = make([*ROWS[:8], chat("a", ""), *ROWS[9:]], rows_per_shard=4)

    def rank(world, collectives):
        own = BlockStore(blocks.folder, blocks.encoder, shards[0], blocks.blocks)
        return build(shards, own, blocks.encoder.data, 64, world, collectives)

    errors = run_ranks(3, rank)
    assert {type(error) for error in errors} == {DataError}
    assert len({str(error) for error in errors}) == 1
    assert "train-00002-of-00005.jsonl row 1: messages[1].content is empty" in str(errors[0])


def test_an_unforeseen_error_does_not_leave_others_waiting(make):
    shards, blocks = make(ROWS)

    def rank(world, collectives):
        own = BlockStore(blocks.folder, blocks.encoder, shards[0], blocks.blocks)
        if world.rank == 1:
            own.block = lambda number: 1 / 0
        return build(shards, own, blocks.encoder.data, 64, world, collectives)

    for error in run_ranks(2, rank):
        assert isinstance(error, DataError) and "can not be read (ZeroDivisionError" in str(error)


def test_overlong_error(make):
    shards, blocks = make(TEXTS, rows_per_shard=2, block_mib=1)
    longest = alone(shards, blocks, 1000).measures[0].longest
    with pytest.raises(
        DataError,
        match=(
            rf"^data.overlong=error: 2 of 4 samples are longer than batch.sequence_length=32 \(longest {longest} "
            r"tokens, .*train-00001-of-00002.jsonl row 2\); set data.overlong=truncate or drop, or split for text, or "
            r"raise batch.sequence_length$"
        ),
    ):
        alone(shards, blocks, 32)


def test_overlong_truncate_drop_split(make, caplog):
    shards, blocks = make(TEXTS, overlong="truncate", pack=False)
    assert alone(shards, blocks, 32).total("num_sequences") == 4
    shards, blocks = make(TEXTS, overlong="drop")
    dropped = alone(shards, blocks, 32)
    assert dropped.total("num_pieces") == 2 and dropped.total("num_left_out") == 2
    assert caplog.text.count("2 of 4 samples are left out") == 1
    shards, blocks = make(TEXTS, overlong="split")
    assert alone(shards, blocks, 32).total("num_left_out") == 0


def test_split_is_for_plain_text(make):
    shards, blocks = make([ROWS[0], chat("a", "fox " * 50)], overlong="split")
    with pytest.raises(
        DataError,
        match=r"data.overlong=split: 1 of 2 samples that are not plain text are longer than "
        r"batch.sequence_length=32 .*set data.overlong=truncate or drop or raise",
    ):
        alone(shards, blocks, 32)


def test_nothing_to_learn_after_truncation_is_left_out(make, caplog):
    shards, blocks = make([chat("word " * 60, "x"), ROWS[0]], overlong="truncate")
    assert alone(shards, blocks, 32).total("num_pieces") == 1
    assert (
        "1 of 2 samples are left out: too long, or nothing to learn within batch.sequence_length=32"
        in caplog.text
    )


def test_nothing_at_all(make):
    shards, blocks = make([chat("word " * 60, "x")], overlong="truncate")
    with pytest.raises(
        DataError,
        match=r"none of the 1 samples of .*train-00000-of-00001.jsonl and the shards beside it "
        r"has a token to learn within batch.sequence_length=32",
    ):
        alone(shards, blocks, 32)


def test_a_shard_of_blank_lines_is_refused_by_name(make, tmp_path):
    _, blocks = make(ROWS)
    (tmp_path / "shards" / "zz.jsonl").write_text("\n\n")
    shards = resolve([Source(path=str(tmp_path / "shards"))])
    data = blocks.encoder.data
    cuts = cut_into_blocks(shards, data, World(), Collectives())
    with pytest.raises(
        DataError, match=r"/zz.jsonl: holds no row; each shard must hold one; remove or fill it"
    ):
        alone(shards, BlockStore(blocks.folder, blocks.encoder, shards[0], cuts))


def test_mixed_kinds_in_one_source_are_refused(make):
    shards, blocks = make([*ROWS[:7], *TEXTS])
    with pytest.raises(
        DataError,
        match=r"train-00001-of-00002.jsonl: its rows are text, those of .*train-00000-of-00002"
        r".jsonl are chat; shards of one source must hold one kind",
    ):
        alone(shards, blocks, 256)


def test_bad_rows_are_skipped_only_where_asked_counted_and_bounded(make, tmp_path, caplog):
    rows = [*ROWS[:5], chat("a", ""), {"no": "messages"}, *ROWS[7:]]
    shards, blocks = make(rows, bad_rows="skip")
    index = alone(shards, blocks)
    assert (index.total("num_bad"), index.total("num_left_out"), index.num_samples) == (2, 2, 20)
    assert (
        "data.bad_rows=skip: 2 of 20 rows can not be used and are left out; the first: "
        in caplog.text
    )
    assert "row 6: messages[1].content is empty" in caplog.text
    shards, blocks = make(rows, bad_rows="skip", max_bad_rows=1)
    with pytest.raises(
        DataError,
        match=r"data.max_bad_rows=1: 2 of 20 rows can not be used; the first: .*row 6: .*; repair "
        r"them, or raise data.max_bad_rows",
    ):
        alone(shards, blocks)


def test_saved_and_loaded(make, tmp_path):
    shards, blocks = make(ROWS)
    index, store = alone(shards, blocks), Store(str(tmp_path / "run"))
    assert index_file.load(store, "index") is None
    index_file.save(index, store, "index")
    found = index_file.load(store, "index")
    assert found == index
    found.verify_unchanged(shards[0])
    found.verify_recipe(recipe(blocks.fingerprint, blocks.encoder.data, 64))


@pytest.mark.parametrize(
    "damage",
    [lambda body: body[:-9], lambda body: body.replace(b"jsonl", b"jsonk"), lambda body: b""],
)
def test_damaged_index(make, tmp_path, damage):
    shards, blocks = make(ROWS)
    store = Store(str(tmp_path / "run"))
    index_file.save(alone(shards, blocks), store, "index")
    store.write("index.json", damage(store.read("index.json")))
    with pytest.raises(
        DataError, match=r"index.json: the stored index is damaged .*; remove the file"
    ):
        index_file.load(store, "index")


def test_index_of_another_format(tmp_path):
    store = Store(str(tmp_path / "run"))
    store.write("index.json", json.dumps({"format": 99, "checksum": ""}).encode() + b"\n{}\n")
    with pytest.raises(DataError, match=r"index.json: is of format 99; this version reads 2"):
        index_file.load(store, "index")


def test_changed_data_is_refused_by_name(make):
    (shards,), blocks = make(ROWS)
    index = alone((shards,), blocks)
    other = replace(shards[1], version="2")
    for now, what in [
        ((shards[0], other, shards[2]), f"{other.url} changed since the run began"),
        (shards[:2], f"{shards[2].url} vanished since the run began"),
        ((*shards, replace(other, url="/new.jsonl")), "/new.jsonl is new since the run began"),
        (shards[::-1], "the shards are in another order than when the run began"),
    ]:
        with pytest.raises(DataError) as caught:
            index.verify_unchanged(now)
        assert what in str(
            caught.value
        ) and "restore it, or start a run with another run.name" in str(caught.value)


def test_changed_recipe_is_refused(make):
    shards, blocks = make(ROWS)
    index = alone(shards, blocks)
    with pytest.raises(
        DataError, match=r"other tokens than when the run began \(sequence_length was 64, is 65\)"
    ):
        index.verify_recipe({**index.recipe, "sequence_length": 65})


@pytest.mark.parametrize("count", [1, 5, 7, 19, 20, 100])
def test_first_samples_only(make, count):
    shards, blocks = make(ROWS, pack=False)
    index = alone(shards, blocks, max_samples=count)
    assert index.total("num_sequences") == index.num_samples == min(count, 20)


@pytest.fixture
def two(make, tmp_path):
    """Two sources of 20 and 5 rows, and their blocks."""
    shards, blocks = make(ROWS)
    write_jsonl(ROWS[:5], Store(str(tmp_path / "more")), "b", 100)
    shards = (*shards, *resolve([Source(path=str(tmp_path / "more"))]))
    data = data_section(train=["a", "b"], block_mib=0.0005, shuffle=False)
    cuts = cut_into_blocks(shards, data, World(), Collectives())
    return shards, BlockStore(
        tmp_path / "two", Encoder(blocks.encoder.tokenizer, data), (*shards[0], *shards[1]), cuts
    )


@pytest.mark.parametrize("count", [6, 20, 22])
def test_sources_beyond_the_first_samples_are_not_refused(two, count):
    shards, blocks = two
    index = alone(shards, blocks, max_samples=count)
    assert index.num_samples == count
    loader = Loader(
        Plan(index.counts, index.sources, blocks.encoder.data, batch_section(), 0), index, blocks
    )
    seen = [
        piece
        for batches in loader.iterate(0, loader.steps_of_a_pass, range(2))
        for batch in batches
        for piece in batch.pieces[:, 0].tolist()
    ]
    assert sorted(seen) == list(range(count))


def test_only_the_block_in_which_the_first_samples_end_is_looked_at_again(two, monkeypatch):
    shards, blocks = two
    loaded, block = [], blocks.block
    monkeypatch.setattr(blocks, "block", lambda number: (loaded.append(number), block(number))[1])
    alone(shards, blocks, max_samples=1)
    assert loaded == [*range(len(blocks.blocks)), 0]


def test_an_error_in_the_block_where_the_first_samples_end_is_raised_on_all(two, monkeypatch):
    from dist_ft.data.blocks import index as module

    shards, blocks = two
    measure = module.cutting.measure
    monkeypatch.setattr(
        module.cutting, "measure", lambda *values: measure(*values) if len(values) < 4 else 1 / 0
    )

    def rank(world, collectives):
        own = BlockStore(blocks.folder, blocks.encoder, blocks.shards, blocks.blocks)
        return build(shards, own, blocks.encoder.data, 64, world, collectives, 1)

    for error in run_ranks(2, rank):
        assert isinstance(error, DataError) and "can not be read (ZeroDivisionError" in str(error)
