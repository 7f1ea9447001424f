"""From a resolved run to the loader of a stream: layouts, shares, order.

A source streams if it is large enough and its shards can be read in parts; the others of the run
are indexed. What was decided is stored with the run when it starts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dist_ft.config.resolved_run import ResolvedRun
from dist_ft.config.schema import BatchSection, DataSection
from dist_ft.core.world import Collectives, World
from dist_ft.data.batching.assemble import BatchBuilder
from dist_ft.data.batching.lane_stream import IndexStream, LaneStream, SliceStream
from dist_ft.data.batching.loader import Loader
from dist_ft.data.batching.stream_loader import StreamLoader
from dist_ft.data.blocks import stream_file
from dist_ft.data.blocks.index import index_recipe
from dist_ft.data.blocks.index_builder import distribute
from dist_ft.data.blocks.segments import measure_block
from dist_ft.data.blocks.slice_store import SliceStore
from dist_ft.data.blocks.slices import Slices, is_splittable
from dist_ft.data.blocks.stream_file import StreamDescription, StreamedSource
from dist_ft.data.sampling.stream_order import (
    MIN_BLOCKS_PER_LANE,
    Cursor,
    StreamLayout,
    StreamOrder,
    plan_layout,
)
from dist_ft.data.sampling.stream_plan import StreamPlan
from dist_ft.data.sources.discovery import Shard
from dist_ft.data.sources.readers import COMPRESSION_RATIO
from dist_ft.data.sources.shard_table import ShardTable
from dist_ft.model.loading.download import cache_folder
from dist_ft.runtime.bootstrap.build_index import (
    FOLDER,
    TRAINING_FIELD,
    DataInput,
    Site,
    encoder_of,
    load_index,
    make_batch_builder,
    make_tokenizer_pool,
)
from dist_ft.runtime.bootstrap.stored_shards import open_shards

STREAM = f"{FOLDER}/{TRAINING_FIELD}.stream"
REST = f"{FOLDER}/{TRAINING_FIELD}.rest"
"""Index of the sources of a streamed run that do not stream."""
SAMPLED_SLICES = 4
"""Slices of a source that are read for its share of a mixture."""


def plan_stream(
    table: ShardTable, data: DataSection, batch: BatchSection, checksum: str
) -> StreamDescription | None:
    """Return how the sources are cut that can stream; None if none can.

    Args:
        table: the shards.
        data: the sources.
        batch: lanes and length of sequences.
        checksum: of the table.
    """
    sources = []
    for source in range(len(data.train)):
        layout = _plan_source(table, source, data, batch)
        if layout is not None:
            sources.append(StreamedSource.from_layout(source, layout))
    if not sources:
        return None
    return StreamDescription(sources=tuple(sources), table=checksum)


def _plan_source(
    table: ShardTable, source: int, data: DataSection, batch: BatchSection
) -> StreamLayout | None:
    """Return how a source is cut; None if it cannot stream."""
    num_lanes = batch.global_batch // batch.micro_batch
    block_bytes = max(1, round(data.block_mib * 2**20))
    layout = plan_layout(table.total_bytes(source), num_lanes, batch.sequence_length, block_bytes)
    if layout is None:
        return None

    # Of a shard that cannot be split, all is read at once: it must not be larger than a block, and
    # there must be enough of them for all lanes.
    largest_whole = 0
    for shard in table.iter_source(source):
        if shard.kind == "hub":
            return None
        if not is_splittable(shard):
            ratio = COMPRESSION_RATIO if shard.codec else 1
            largest_whole = max(largest_whole, shard.size * ratio)

    if not largest_whole:
        return layout
    num_shards = table.num_shards(source)
    if largest_whole > block_bytes or num_shards < MIN_BLOCKS_PER_LANE * num_lanes:
        return None
    return StreamLayout(layout.num_bytes, min(layout.num_blocks, num_shards), 1)


@dataclass(frozen=True)
class StreamParts:
    """What the loader of a stream is made of.

    Attributes:
        data: how rows become sequences.
        batch: sizes of batches.
        seed: seed of the run.
        layouts: how each source that streams is cut.
        store: their tokenized slices.
        indexed: loader over the other sources; None without any.
        builder: builds batches.
    """

    data: DataSection
    batch: BatchSection
    seed: int
    layouts: Mapping[int, StreamLayout]
    store: SliceStore
    indexed: Loader | None
    builder: BatchBuilder


def make_stream_loader(parts: StreamParts, sizes: Sequence[float]) -> StreamLoader:
    """Return the loader of a stream; `sizes`: sequences of an epoch of each source."""
    plan = StreamPlan(sizes, parts.data, parts.batch, parts.seed)
    orders = {}
    for source, layout in parts.layouts.items():
        seed = plan.source_seed(source)
        orders[source] = StreamOrder(layout, plan.num_lanes, seed, parts.data.shuffle_blocks)

    def make_stream(source: int, lane: int, cursor: Cursor) -> LaneStream:
        if source not in orders:
            assert parts.indexed is not None
            return IndexStream(source, lane, parts.indexed, cursor)
        return SliceStream(
            source, lane, orders[source], parts.store, (parts.data, parts.batch), cursor
        )

    return StreamLoader(plan, parts.store, make_stream, len(sizes), parts.builder, parts.indexed)


def estimate_sizes(parts: StreamParts, world: World, collectives: Collectives) -> tuple[float, ...]:
    """Return the sequences of an epoch of each source; a collective call.

    Those of a source that streams are estimated from some of its slices. With a single source
    nothing depends on its size, and nothing is read.
    """
    num_sources = len(parts.data.train)
    if num_sources == 1:
        return (1.0,)

    sampled: list[tuple[int, int]] = []  # (source, its slice)
    for source, layout in parts.layouts.items():
        for place in range(SAMPLED_SLICES):
            number = (2 * place + 1) * layout.num_slices // (2 * SAMPLED_SLICES)
            sampled.append((source, number))

    def global_number(place: int) -> int:
        source, number = sampled[place]
        return int(parts.store.slices.numbers(source, np.array([number]))[0])

    def count(place: int) -> int:
        block = parts.store.read(global_number(place))
        return measure_block(block, parts.data, parts.batch.sequence_length).num_sequences

    def name(place: int) -> str:
        return parts.data.train[sampled[place][0]].path

    counts = distribute(range(len(sampled)), count, name, world, collectives)
    sizes = []
    for source in range(num_sources):
        if source in parts.layouts:
            own = [counts[place] for place, (of, _) in enumerate(sampled) if of == source]
            sizes.append(max(1.0, sum(own) / len(own) * parts.layouts[source].num_slices))
        else:
            assert parts.indexed is not None
            sizes.append(float(parts.indexed.plan.num_sequences(source)))
    return tuple(sizes)


def load_stream(
    run: ResolvedRun, data: DataInput, description: StreamDescription, site: Site
) -> StreamLoader:
    """Return the loader of a stream; a collective call.

    `description`: as the run stored it; as it was planned, without recipe, on its first start.
    """
    config, section = run.config, data.section
    shards_folder = cache_folder(config.data.cache_dir, "shards")
    table = open_shards(site.store, STREAM, shards_folder, description.table)
    layouts = description.layouts
    encoder = encoder_of(run, data)
    slices = SliceStore(
        cache_folder(config.data.cache_dir, "tokens"),
        encoder,
        Slices(table, layouts),
        make_tokenizer_pool(config, section, encoder),
        section.cache_gib * 2**30,
    )
    recipe = index_recipe(slices.writer.fingerprint, section, config.batch.sequence_length)
    if description.recipe:
        stream_file.verify_recipe(description, recipe)

    parts = StreamParts(
        section,
        config.batch,
        config.run.seed,
        layouts,
        slices,
        _load_rest(run, data, table, layouts, site),
        make_batch_builder(run, data, site),
    )
    if not description.recipe:
        sizes = estimate_sizes(parts, site.world, site.collectives)
        description = description.model_copy(update={"sizes": sizes, "recipe": {**recipe}})
        site.on_rank0(lambda: stream_file.save(description, site.store, STREAM))
    return make_stream_loader(parts, description.sizes)


def _load_rest(
    run: ResolvedRun,
    data: DataInput,
    table: ShardTable,
    layouts: Mapping[int, StreamLayout],
    site: Site,
) -> Loader | None:
    """Return the loader of the sources that do not stream; None without any."""
    num_sources = len(data.section.train)
    if len(layouts) == num_sources:
        return None

    # Only these have shards here, so that the numbers of sources stay the same.
    rest: list[tuple[Shard, ...]] = []
    for source in range(num_sources):
        rest.append(() if source in layouts else tuple(table.iter_source(source)))
    return load_index(run, data, rest, site, REST)
