"""The index: the same on every rank; the overlong policies; the data that is refused."""

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
from dist_ft.data.blocks.index import index_recipe
from dist_ft.data.blocks.index_builder import build_index, split_into_blocks
from dist_ft.data.blocks.index_checks import check_index
from dist_ft.data.encoding.chat import Encoder
from dist_ft.data.sampling.batch_plan import BatchPlan
from dist_ft.data.sources.discovery import discover_shards
from dist_ft.data.tools.write import write_jsonl
from dist_ft.storage.filesystem import Store

ROWS = [chat(f"q {i}", "the fox " * (1 + i % 5)) for i in range(20)]
TEXTS = [{"text": "the quick fox " * n} for n in (1, 30, 2, 50)]


def index_alone(shards, blocks, length=64, **values):
    index = build_index(
        shards, blocks, blocks.encoder.data, length, World(), Collectives(), **values
    )
    check_index(index, blocks.encoder.data, length)
    return index


def test_index_counts_rows_segments_and_tokens(make):
    shards, blocks = make(ROWS)
    index = index_alone(shards, blocks)
    assert (index.num_samples, index.total("num_segments"), index.total("num_left_out")) == (
        20,
        20,
        0,
    )
    assert index.first_samples[-1] == 20 and len(index.blocks) == len(index.block_stats) > 2
    lengths = [
        n
        for i in range(len(blocks.blocks))
        for n in (blocks.block(i).offsets[1:] - blocks.block(i).offsets[:-1])
    ]
    assert index.total("num_tokens") == sum(lengths)
    assert index.total("num_targets") == sum(
        int(blocks.block(i).targets.sum()) for i in range(len(blocks.blocks))
    )
    assert [index.locate_sample(sample) for sample in range(20)] == [
        (shards[0][sample // 7], sample % 7) for sample in range(20)
    ]


@pytest.mark.parametrize("size", [1, 2, 5])
def test_every_world_has_the_same_index(make, tmp_path, size):
    shards, blocks = make(ROWS, rows_per_shard=3)
    expected = index_alone(shards, blocks)
    data = blocks.encoder.data

    def rank(world, collectives):
        assert split_into_blocks(shards, data, world, collectives) == blocks.blocks
        own = BlockStore(tmp_path / f"cache-{world.rank}", blocks.encoder, shards[0], blocks.blocks)
        built = build_index(shards, own, data, 64, world, collectives)
        return built, len(list(own.folder.glob("*.safetensors")))

    results = run_ranks(size, rank)
    assert all(found == expected for found, _ in results)
    assert sum(count for _, count in results) == len(blocks.blocks), "each block on one rank"


def test_error_of_one_rank_is_raised_on_all(make):
    shards, blocks = make([*ROWS[:8], chat("a", ""), *ROWS[9:]], rows_per_shard=4)

    def rank(world, collectives):
        own = BlockStore(blocks.folder, blocks.encoder, shards[0], blocks.blocks)
        return build_index(shards, own, blocks.encoder.data, 64, world, collectives)

    errors = run_ranks(3, rank)
    assert {type(error) for error in errors} == {DataError}
    assert len({str(error) for error in errors}) == 1
    assert "train-00002-of-00005.jsonl row 1: messages[1].content is empty" in str(errors[0])


def test_unexpected_error_is_raised_on_all_ranks(make):
    shards, blocks = make(ROWS)

    def rank(world, collectives):
        own = BlockStore(blocks.folder, blocks.encoder, shards[0], blocks.blocks)
        if world.rank == 1:
            own.block = lambda number: 1 / 0
        return build_index(shards, own, blocks.encoder.data, 64, world, collectives)

    for error in run_ranks(2, rank):
        assert isinstance(error, DataError) and "cannot be read (ZeroDivisionError" in str(error)


def test_overlong_error_names_the_longest_sample(make):
    shards, blocks = make(TEXTS, rows_per_shard=2, block_mib=1)
    longest = index_alone(shards, blocks, 1000).block_stats[0].longest
    with pytest.raises(
        DataError,
        match=(
            rf"^data.overlong=error: 2 of 4 samples are longer than batch.sequence_length=32 \(the "
            rf"longest has {longest} tokens: .*train-00001-of-00002.jsonl row 2\)\. Set data.overlong to "
            r"truncate or drop \(or split for plain text\), or raise batch.sequence_length\.$"
        ),
    ):
        index_alone(shards, blocks, 32)


def test_overlong_truncate_drop_split(make, caplog):
    shards, blocks = make(TEXTS, overlong="truncate", pack=False)
    assert index_alone(shards, blocks, 32).total("num_sequences") == 4
    shards, blocks = make(TEXTS, overlong="drop")
    dropped = index_alone(shards, blocks, 32)
    assert dropped.total("num_segments") == 2 and dropped.total("num_left_out") == 2
    assert caplog.text.count("2 of 4 samples are left out") == 1
    shards, blocks = make(TEXTS, overlong="split")
    assert index_alone(shards, blocks, 32).total("num_left_out") == 0


def test_split_is_refused_for_chat_rows(make):
    shards, blocks = make([ROWS[0], chat("a", "fox " * 50)], overlong="split")
    with pytest.raises(
        DataError,
        match=r"data.overlong=split: 1 of 2 samples that are not plain text are longer than "
        r"batch.sequence_length=32 .*Set data.overlong to truncate or drop, or raise",
    ):
        index_alone(shards, blocks, 32)


def test_sample_without_targets_after_truncation_is_left_out(make, caplog):
    shards, blocks = make([chat("word " * 60, "x"), ROWS[0]], overlong="truncate")
    assert index_alone(shards, blocks, 32).total("num_segments") == 1
    assert (
        "1 of 2 samples are left out: too long, or without a target token within batch.sequence_length=32"
        in caplog.text
    )


def test_source_without_targets_is_refused(make):
    shards, blocks = make([chat("word " * 60, "x")], overlong="truncate")
    with pytest.raises(
        DataError,
        match=r"none of the 1 samples of .*train-00000-of-00001.jsonl and its neighboring shards "
        r"has a target token within batch.sequence_length=32",
    ):
        index_alone(shards, blocks, 32)


def test_shard_of_blank_lines_is_refused_by_name(make, tmp_path):
    _, blocks = make(ROWS)
    (tmp_path / "shards" / "zz.jsonl").write_text("\n\n")
    shards = discover_shards([Source(path=str(tmp_path / "shards"))])
    data = blocks.encoder.data
    cuts = split_into_blocks(shards, data, World(), Collectives())
    with pytest.raises(
        DataError,
        match=r"/zz.jsonl: has no rows. Each shard needs at least one row. Remove or fill it",
    ):
        index_alone(shards, BlockStore(blocks.folder, blocks.encoder, shards[0], cuts))


def test_mixed_formats_in_one_source_are_refused(make):
    shards, blocks = make([*ROWS[:7], *TEXTS])
    with pytest.raises(
        DataError,
        match=r"train-00001-of-00002.jsonl: its rows are text, but those of .*train-00000-of-00002"
        r".jsonl are chat. All shards of a source must have one format",
    ):
        index_alone(shards, blocks, 256)


def test_bad_rows_are_skipped_counted_and_limited(make, tmp_path, caplog):
    rows = [*ROWS[:5], chat("a", ""), {"no": "messages"}, *ROWS[7:]]
    shards, blocks = make(rows, bad_rows="skip")
    index = index_alone(shards, blocks)
    assert (index.total("num_bad"), index.total("num_left_out"), index.num_samples) == (2, 2, 20)
    assert (
        "data.bad_rows=skip: 2 of 20 rows cannot be used and are skipped; the first: "
        in caplog.text
    )
    assert "row 6: messages[1].content is empty" in caplog.text
    shards, blocks = make(rows, bad_rows="skip", max_bad_rows=1)
    with pytest.raises(
        DataError,
        match=r"data.max_bad_rows=1: 2 of 20 rows cannot be used; the first: .*row 6: .*Repair "
        r"them, or raise data.max_bad_rows",
    ):
        index_alone(shards, blocks)


def test_saved_index_is_loaded_unchanged(make, tmp_path):
    shards, blocks = make(ROWS)
    index, store = index_alone(shards, blocks), Store(str(tmp_path / "run"))
    assert index_file.load(store, "index") is None
    index_file.save(index, store, "index")
    found = index_file.load(store, "index")
    assert found == index
    found.verify_unchanged(shards[0])
    found.verify_recipe(index_recipe(blocks.fingerprint, blocks.encoder.data, 64))


@pytest.mark.parametrize(
    "damage",
    [lambda body: body[:-9], lambda body: body.replace(b"jsonl", b"jsonk"), lambda body: b""],
)
def test_damaged_index_is_refused(make, tmp_path, damage):
    shards, blocks = make(ROWS)
    store = Store(str(tmp_path / "run"))
    index_file.save(index_alone(shards, blocks), store, "index")
    store.write("index.json", damage(store.read("index.json")))
    with pytest.raises(
        DataError, match=r"index.json: the stored index is damaged .*Remove the file"
    ):
        index_file.load(store, "index")


def test_index_of_another_format_is_refused(tmp_path):
    store = Store(str(tmp_path / "run"))
    store.write("index.json", json.dumps({"format": 99, "checksum": ""}).encode() + b"\n{}\n")
    with pytest.raises(DataError, match=r"index.json: has format 99. This version reads format 2"):
        index_file.load(store, "index")


def test_changed_data_is_refused_by_name(make):
    (shards,), blocks = make(ROWS)
    index = index_alone((shards,), blocks)
    other = replace(shards[1], version="2")
    for now, what in [
        ((shards[0], other, shards[2]), f"{other.url} changed since the run started"),
        (shards[:2], f"{shards[2].url} vanished since the run started"),
        ((*shards, replace(other, url="/new.jsonl")), "/new.jsonl is new since the run started"),
        (shards[::-1], "the shards are in another order than when the run started"),
    ]:
        with pytest.raises(DataError) as caught:
            index.verify_unchanged(now)
        assert what in str(
            caught.value
        ) and "Restore it, or start a run with another run.name" in str(caught.value)


def test_changed_recipe_is_refused(make):
    shards, blocks = make(ROWS)
    index = index_alone(shards, blocks)
    with pytest.raises(
        DataError, match=r"other tokens than when the run started \(sequence_length was 64, is 65\)"
    ):
        index.verify_recipe({**index.recipe, "sequence_length": 65})


@pytest.mark.parametrize("count", [1, 5, 7, 19, 20, 100])
def test_only_max_samples_rows_count(make, count):
    shards, blocks = make(ROWS, pack=False)
    index = index_alone(shards, blocks, max_samples=count)
    assert index.total("num_sequences") == index.num_samples == min(count, 20)


@pytest.fixture
def two_sources(make, tmp_path):
    """Two sources of 20 and 5 rows, and their blocks."""
    shards, blocks = make(ROWS)
    write_jsonl(ROWS[:5], Store(str(tmp_path / "more")), "b", 100)
    shards = (*shards, *discover_shards([Source(path=str(tmp_path / "more"))]))
    data = data_section(train=["a", "b"], block_mib=0.0005, shuffle=False)
    cuts = split_into_blocks(shards, data, World(), Collectives())
    return shards, BlockStore(
        tmp_path / "two", Encoder(blocks.encoder.tokenizer, data), (*shards[0], *shards[1]), cuts
    )


@pytest.mark.parametrize("count", [6, 20, 22])
def test_sources_after_max_samples_are_not_refused(two_sources, count):
    shards, blocks = two_sources
    index = index_alone(shards, blocks, max_samples=count)
    assert index.num_samples == count
    loader = Loader(
        BatchPlan(index.counts, index.sources, blocks.encoder.data, batch_section(), 0),
        index,
        blocks,
    )
    seen = [
        sample
        for batches in loader.iterate(0, loader.steps_per_epoch, range(2))
        for batch in batches
        for sample in batch.segments[:, 0].tolist()
    ]
    assert sorted(seen) == list(range(count))


def test_only_the_block_cut_by_max_samples_is_measured_again(two_sources, monkeypatch):
    shards, blocks = two_sources
    loaded, block = [], blocks.block
    monkeypatch.setattr(blocks, "block", lambda number: (loaded.append(number), block(number))[1])
    index_alone(shards, blocks, max_samples=1)
    assert loaded == [*range(len(blocks.blocks)), 0]


def test_error_while_measuring_again_is_raised_on_all_ranks(two_sources, monkeypatch):
    from dist_ft.data.blocks import index_builder as module

    shards, blocks = two_sources
    measure_block = module.segments.measure_block
    monkeypatch.setattr(
        module.segments,
        "measure_block",
        lambda *values: measure_block(*values) if len(values) < 4 else 1 / 0,
    )

    def rank(world, collectives):
        own = BlockStore(blocks.folder, blocks.encoder, blocks.shards, blocks.blocks)
        return build_index(shards, own, blocks.encoder.data, 64, world, collectives, 1)

    for error in run_ranks(2, rank):
        assert isinstance(error, DataError) and "cannot be read (ZeroDivisionError" in str(error)
