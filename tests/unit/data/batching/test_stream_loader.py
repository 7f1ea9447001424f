"""The streamed loader: the same batches in every world, exact resumes, each segment once."""

from __future__ import annotations

import shutil
from collections import Counter
from threading import Event
from threading import enumerate as enumerate_threads
from typing import Any

import numpy as np
import pytest
from unit.data.data_helpers import batch_section, data_section

from dist_ft.config.schema import Source
from dist_ft.core.errors import DataError
from dist_ft.core.world import Collectives, World
from dist_ft.data.batching.lane_stream import IndexStream, SliceStream
from dist_ft.data.batching.loader import Loader
from dist_ft.data.batching.stream_loader import StreamLoader
from dist_ft.data.blocks.block_store import BlockStore
from dist_ft.data.blocks.index_builder import build_index, split_into_blocks
from dist_ft.data.blocks.slice_store import SliceStore
from dist_ft.data.blocks.slices import SAMPLE_BITS, Slices
from dist_ft.data.encoding.chat import Encoder
from dist_ft.data.sampling.batch_plan import BatchPlan
from dist_ft.data.sampling.stream_order import StreamLayout, StreamOrder
from dist_ft.data.sampling.stream_plan import StreamPlan
from dist_ft.data.sources.discovery import discover_shards
from dist_ft.data.sources.shard_table import ShardTable, write_table
from dist_ft.data.tools.write import write_jsonl
from dist_ft.storage.filesystem import Store

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "hello", "there", "how"]
LENGTH = 32


def text_rows(count: int, seed: int) -> list[dict[str, str]]:
    drawn = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        words = drawn.choice(WORDS, drawn.integers(1, 12)).tolist()
        rows.append({"text": f"{number} {' '.join(words)}"})
    return rows


class Streamed:
    """Loaders over sources of which the first ones stream."""

    def __init__(self, tmp_path: Any, tokenizer: Any, rows: list[Any], **values: Any) -> None:
        self.paths = []
        for number, own in enumerate(rows):
            store = Store(str(tmp_path / f"source-{number}"))
            write_jsonl(own, store, "part", 1 + len(own) // 3)
            self.paths.append(store.url)
        self.num_indexed = values.pop("num_indexed", 0)
        self.layout = values.pop("layout", (8, 3))
        weights = values.pop("weights", None) or [None] * len(rows)
        sources = tuple(
            Source(path=path, weight=weight)
            for path, weight in zip(self.paths, weights, strict=True)
        )
        fields = {"overlong": "truncate", "bad_rows": "skip", "train": sources, **values}
        self.data = data_section(**fields)
        self.batch = batch_section(global_batch=8, micro_batch=2, sequence_length=LENGTH)
        self.encoder = Encoder(tokenizer, self.data)
        self.cache = tmp_path / "cache"
        self.shards = discover_shards(sources)
        write_table(tmp_path / "shards.arrow", self.shards)
        self.table = ShardTable(tmp_path / "shards.arrow")

    @property
    def num_streamed(self) -> int:
        return len(self.paths) - self.num_indexed

    def loader(self) -> StreamLoader:
        listed = self.table
        layouts = {
            source: StreamLayout(sum(shard.size for shard in self.shards[source]), *self.layout)
            for source in range(self.num_streamed)
        }
        slices = Slices(listed, layouts)
        store = SliceStore(self.cache, self.encoder, slices)
        sizes = [100.0] * len(self.paths)
        plan = StreamPlan(sizes, self.data, self.batch, seed=5)
        orders = {
            source: StreamOrder(
                layout, plan.num_lanes, plan.source_seed(source), self.data.shuffle_blocks
            )
            for source, layout in layouts.items()
        }
        indexed = self.indexed_loader() if self.num_indexed else None

        def make_stream(source: int, lane: int, cursor: Any) -> Any:
            if source not in orders:
                assert indexed is not None
                return IndexStream(source, lane, indexed, cursor)
            sections = (self.data, self.batch)
            return SliceStream(source, lane, orders[source], store, sections, cursor)

        return StreamLoader(plan, store, make_stream, len(self.paths))

    def indexed_loader(self) -> Loader:
        own = [() if n < self.num_streamed else shards for n, shards in enumerate(self.shards)]
        world, comms = World(), Collectives()
        blocks = split_into_blocks(own, self.data, world, comms)
        flat = [shard for shards in own for shard in shards]
        store = BlockStore(self.cache, self.encoder, flat, blocks)
        index = build_index(own, store, self.data, LENGTH, world, comms)
        plan = BatchPlan(index.counts, index.sources, self.data, self.batch, 5)
        return Loader(plan, index, store)


def run(streamed: Streamed, worlds: list[int], stops: list[int]) -> dict[tuple[int, int], Any]:
    """Return the batches by (step, lane) of a run that stops and resumes in another world."""
    batches: dict[tuple[int, int], Any] = {}
    cursors = np.zeros((0, 6), dtype=np.int64)
    start = 0
    for world, stop in zip(worlds, stops, strict=True):
        after = []
        for rank in range(world):
            loader = streamed.loader()
            loader.restore(start, cursors)
            lanes = World(rank, world).share(loader.plan.num_lanes)
            steps = loader.iterate(start, stop, lanes)
            for step in range(start, stop):
                for batch in next(steps):
                    batches[step, batch.lane] = batch
            after.append(loader.cursors())
            steps.close()
            loader.close()
        cursors = np.concatenate(after)
        start = stop
    return batches


def segments_of(batches: dict[tuple[int, int], Any]) -> list[tuple[int, ...]]:
    found = []
    for batch in batches.values():
        found += [tuple(row) for row in batch.segments.tolist()]
    return found


@pytest.mark.parametrize("values", [{}, {"pack": False, "bucket": 4}], ids=["packed", "bucketed"])
def test_every_world_and_every_resume_has_the_same_batches(tmp_path, tokenizer, values):
    streamed = Streamed(tmp_path, tokenizer, [text_rows(300, 0)], **values)
    expected = run(streamed, [1], [30])
    found = run(streamed, [4, 3, 1, 2], [3, 11, 12, 30])
    assert expected.keys() == found.keys()
    for key, batch in expected.items():
        assert np.array_equal(batch.input_ids, found[key].input_ids)
        assert np.array_equal(batch.target_ids, found[key].target_ids)
        assert np.array_equal(batch.segments, found[key].segments)


def test_every_segment_comes_once_in_an_epoch(tmp_path, tokenizer):
    rows = text_rows(300, 1)
    streamed = Streamed(tmp_path, tokenizer, [rows])
    batches = run(streamed, [2], [60])
    counts = Counter((sample, first, epoch) for sample, first, _, epoch in segments_of(batches))
    assert set(counts.values()) == {1}
    by_epoch = Counter(epoch for _, _, epoch in counts)
    # all lanes have passed the first epoch
    assert max(by_epoch) >= 2
    assert by_epoch[0] == len(rows)
    texts = set()
    for batch in batches.values():
        for row in batch.input_ids:
            texts.add(tokenizer.decode(row))
    assert len(texts) > 40


def test_a_mixture_with_an_indexed_source(tmp_path, tokenizer):
    rows = [text_rows(300, 2), text_rows(40, 3)]
    streamed = Streamed(tmp_path, tokenizer, rows, num_indexed=1, weights=[3.0, 1.0])
    batches = run(streamed, [3, 1], [20, 60])
    again = run(streamed, [1, 4], [7, 60])
    assert sorted(segments_of(batches)) == sorted(segments_of(again))
    counts = Counter((sample, first, epoch) for sample, first, _, epoch in segments_of(batches))
    assert set(counts.values()) == {1}
    sources = Counter(source for batch in batches.values() for source, _ in batch.row_sources)
    assert abs(sources[0] / sum(sources.values()) - 0.75) < 0.02
    # the ids of an indexed source lie below those of slices
    indexed = {sample for sample, *_ in counts if sample < 1 << SAMPLE_BITS}
    assert indexed == set(range(40))


def test_cursors_are_those_of_the_yielded_step(tmp_path, tokenizer):
    streamed = Streamed(tmp_path, tokenizer, [text_rows(300, 4)])
    loader = streamed.loader()
    steps = loader.iterate(0, 10, range(4))
    next(steps)
    first = loader.cursors()
    assert first[:, 0].tolist() == [0, 1, 2, 3]
    assert first[:, 5].tolist() == [2, 2, 2, 2]  # a micro-batch each
    assert first.itemsize * first.shape[1] <= 64
    steps.close()
    loader.close()


def test_facts_say_what_each_slice_holds(tmp_path, tokenizer):
    rows = text_rows(300, 5)
    streamed = Streamed(tmp_path, tokenizer, [rows])
    loader = streamed.loader()
    for _ in loader.iterate(0, 40, range(4)):
        pass
    facts = loader.take_facts()
    assert len(np.unique(facts[:, 0])) == len(facts) == 24
    assert facts[:, 1].sum() == len(rows)
    assert facts[:, 3].sum() == len(rows)
    assert len(loader.take_facts()) == 0
    loader.close()


def test_facts_come_again_after_a_rollback(tmp_path, tokenizer):
    streamed = Streamed(tmp_path, tokenizer, [text_rows(300, 5)])
    loader = streamed.loader()

    def facts_of(start: int, stop: int, cursors: Any) -> set[int]:
        loader.restore(start, cursors)
        found: set[int] = set()
        for _ in loader.iterate(start, stop, range(4)):
            found.update(loader.take_facts()[:, 0].tolist())
        return found

    committed = facts_of(0, 3, np.zeros((0, 6), dtype=np.int64))
    cursors = loader.cursors()
    dropped = facts_of(3, 20, cursors)
    assert dropped - committed
    assert committed | facts_of(3, 40, cursors) == set(range(24))
    loader.close()


def test_a_step_that_a_rollback_left_behind_moves_no_lane(tmp_path, tokenizer, monkeypatch):
    streamed = Streamed(tmp_path, tokenizer, [text_rows(300, 6)], layout=(24, 1))
    expected = run(streamed, [1], [12])
    shutil.rmtree(streamed.cache)
    load = SliceStream._load
    is_stuck, may_continue = Event(), Event()

    def slow_load(stream: Any, cursor: Any) -> Any:
        # the second window of lane 1 takes until the rollback is over
        if cursor.first and stream._lane == 1 and not is_stuck.is_set():
            is_stuck.set()
            assert may_continue.wait(30)
        return load(stream, cursor)

    monkeypatch.setattr(SliceStream, "_load", slow_load)
    loader = streamed.loader()
    steps = loader.iterate(0, 12, range(4))
    next(steps)
    cursors = loader.cursors()
    assert is_stuck.wait(30)
    left_behind = [thread for thread in enumerate_threads() if "loader" in thread.name]
    steps.close()

    loader.restore(1, cursors)
    steps = loader.iterate(1, 12, range(4))
    batches = [next(steps)]
    may_continue.set()
    for thread in left_behind:
        thread.join(30)
    batches += steps
    loader.close()
    for step, own in enumerate(batches, start=1):
        for batch in own:
            assert np.array_equal(batch.segments, expected[step, batch.lane].segments)


def test_altered_data_is_refused_when_it_comes_again(tmp_path, tokenizer):
    rows = text_rows(60, 6)
    streamed = Streamed(tmp_path, tokenizer, [rows], layout=(4, 1))
    loader = streamed.loader()
    for _ in loader.iterate(0, 3, range(4)):
        pass
    number = int(loader.take_facts()[0, 0])
    path = loader.store.writer.path(loader.store.slices.block(number))
    other = next(each for each in streamed.cache.glob("*.safetensors") if each != path)
    path.write_bytes(other.read_bytes())
    with pytest.raises(DataError, match="gives other tokens than when the run first read it"):
        loader.store.read(number)
    assert not path.exists()
    loader.close()


def test_a_source_without_targets_is_refused(tmp_path, tokenizer):
    rows = [{"prompt": "hello " * 80, "response": "there"} for _ in range(60)]
    streamed = Streamed(tmp_path, tokenizer, [rows], layout=(4, 2))
    loader = streamed.loader()
    with pytest.raises(DataError, match="none of the rows of a whole epoch"):
        next(loader.iterate(0, 1, range(4)))
    loader.close()
