"""From a resolved run to its loaders: shards, encoder, blocks, index, batch plan.

The index is built on the first start and stored with the run.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

from dist_ft.config.checks.streaming import index_reasons
from dist_ft.config.resolved_run import ResolvedRun
from dist_ft.config.schema import DataSection, ModelSection, RunConfig, Source
from dist_ft.core.errors import ConfigError
from dist_ft.core.world import Collectives, World, on_rank0
from dist_ft.data.batching.loader import Loader
from dist_ft.data.batching.stream_loader import StreamLoader
from dist_ft.data.blocks import index_builder, stream_file
from dist_ft.data.blocks.block_store import BlockStore
from dist_ft.data.blocks.stream_file import StreamDescription
from dist_ft.data.encoding.chat import Encoder
from dist_ft.data.sampling.stream_order import MIN_BLOCKS_PER_LANE, min_stream_bytes
from dist_ft.data.sources.discovery import discover_shards, iter_shards
from dist_ft.data.sources.shard_table import ShardTable
from dist_ft.model.loading.download import cache_folder
from dist_ft.model.loading.load import load_tokenizer
from dist_ft.runtime.bootstrap.build_index import (
    FOLDER,
    TRAINING_FIELD,
    DataInput,
    Site,
    load_index,
    make_block_store,
)
from dist_ft.runtime.bootstrap.build_stream import (
    STREAM,
    load_stream,
    plan_stream,
)
from dist_ft.runtime.bootstrap.stored_shards import SUFFIX, store_shards, write_shards
from dist_ft.storage.filesystem import Store

INDEX = f"{FOLDER}/{TRAINING_FIELD}"

TrainingLoader = Loader | StreamLoader

log = logging.getLogger("dist_ft.run")


@dataclass(frozen=True)
class Loaders:
    """The loaders of a run over training data and held-out data (None without any).

    Attributes:
        is_new: whether the run had no index or stream of its training data yet, or had lost it.
    """

    training: TrainingLoader
    evaluation: Loader | None
    is_new: bool

    def close(self) -> None:
        """Stop reading ahead."""
        self.training.close()
        if self.evaluation is not None:
            self.evaluation.close()


def build_loaders(
    run: ResolvedRun, store: Store, world: World, collectives: Collectives
) -> Loaders:
    """Return the loaders of a run; a collective call.

    Every rank gets the same index or the same error.
    """
    is_new = on_rank0(
        world, collectives, lambda: not any(store.exists(f"{n}.json") for n in (INDEX, STREAM))
    )
    training = build_training_loader(run, store, world, collectives)

    evaluation = None
    if run.config.evaluation.data:
        evaluation = build_held_out_loader(
            run, run.config.evaluation.data, store, world, collectives
        )
    return Loaders(training, evaluation, is_new)


def build_training_loader(
    run: ResolvedRun, store: Store, world: World, collectives: Collectives
) -> TrainingLoader:
    """Return the loader over the training data; a collective call.

    A run keeps the order that it started with, streamed or indexed.

    Raises:
        ConfigError: data.order is another one.
    """
    data = DataInput(TRAINING_FIELD, run.config.effective_data)
    site = Site(store, world, collectives)
    description = site.on_rank0(lambda: stream_file.load(store, STREAM))
    if description is not None:
        _require_order(run.config, "streamed")
        return load_stream(run, data, description, site)
    if site.on_rank0(lambda: store.exists(f"{INDEX}.json")):
        _require_order(run.config, "indexed")
        return _build_loader(run, data, site)
    if not _may_stream(run.config):
        return _build_loader(run, data, site)

    # One rank lists and all use its listing, so that no two ranks see different shards.
    folder = cache_folder(run.config.data.cache_dir, "shards")

    tables: list[ShardTable] = []

    def list_and_plan() -> StreamDescription | None:
        checksum = write_shards(iter_shards(data.section.train, data.field), folder)
        tables.append(ShardTable(folder / f"{checksum}{SUFFIX}"))
        return plan_stream(tables[0], data.section, run.config.batch, checksum)

    planned = site.on_rank0(list_and_plan)
    if planned is None and run.config.data.order == "streamed":
        raise _no_stream(run.config)
    if planned is None:
        sources = range(len(data.section.train))
        shards_by_source = site.on_rank0(lambda: [tuple(tables[0].iter_source(s)) for s in sources])
        return load_index(run, data, shards_by_source, site, INDEX)

    site.on_rank0(lambda: store_shards(store, STREAM, folder, planned.table))
    return load_stream(run, data, planned, site)


def build_held_out_loader(
    run: ResolvedRun,
    sources: Sequence[Source],
    store: Store,
    world: World,
    collectives: Collectives,
) -> Loader:
    """Return the loader over held-out `sources`, the first evaluation.max_samples samples.

    A collective call.
    """
    # Names and weights belong to a mixture; held-out data is read once, from start to end.
    plain = tuple(Source(path=s.path, subset=s.subset, split=s.split) for s in sources)
    data = DataInput(
        "evaluation.data", _in_order(run.config, plain), run.config.evaluation.max_samples
    )

    return _build_loader(run, data, Site(store, world, collectives))


def build_anchor_loader(
    run: ResolvedRun, store: Store, world: World, collectives: Collectives
) -> Loader:
    """Return the loader over tuning.anchor.data; a collective call. The caller closes its store."""
    anchor = run.config.tuning.anchor
    data = DataInput("tuning.anchor.data", _in_order(run.config, anchor.data), anchor.max_samples)

    return _build_loader(run, data, Site(store, world, collectives))


def build_block_store(config: RunConfig, model: ModelSection, block_mib: float) -> BlockStore:
    """Return the training data in blocks of `block_mib` MiB, not read yet, for tools.

    They hold rows, or tokens if the task is causal_lm.
    """
    section = config.data.model_copy(update={"block_mib": block_mib})
    tokenizer = load_tokenizer(model, section.cache_dir)

    # A tool runs in one process, however many workers the run has.
    shards_by_source = discover_shards(section.train)
    blocks = index_builder.split_into_blocks(shards_by_source, section, World(), Collectives())
    shards = list(chain.from_iterable(shards_by_source))

    return make_block_store(config, section, Encoder(tokenizer, section), shards, blocks)


def _in_order(config: RunConfig, sources: tuple[Source, ...]) -> DataSection:
    """Return the data section for `sources`, read in their order and without a mixture."""
    return config.effective_data.model_copy(
        update={"shuffle": False, "train": sources, "mixing": (), "temperature": None}
    )


def _require_order(config: RunConfig, order: str) -> None:
    """Raise ConfigError if the config names another order than the run has."""
    if config.data.order not in ("auto", order):
        raise ConfigError(
            [
                f"data.order={config.data.order}: the run started {order}, and its samples would "
                f"change. Set data.order={order} or auto, or start a run with another run.name."
            ]
        )


def _no_stream(config: RunConfig) -> ConfigError:
    """Return the error for data of which no source can be streamed."""
    num_bytes = min_stream_bytes(config.num_lanes, config.batch.sequence_length)
    return ConfigError(
        [
            "data.order=streamed: no source can be streamed. Allowed: sources of at least "
            f"{num_bytes / 1e6:,.1f} MB (for {config.num_lanes} lanes of "
            f"{config.batch.sequence_length} tokens), in .jsonl or .parquet shards of any size, or "
            f"in at least {MIN_BLOCKS_PER_LANE * config.num_lanes} other shards up to "
            "data.block_mib. Set data.order=auto."
        ]
    )


def _may_stream(config: RunConfig) -> bool:
    """Whether the settings allow the data to stream."""
    if config.data.order == "auto":
        return not index_reasons(config)
    return config.data.order == "streamed"


def _build_loader(run: ResolvedRun, data: DataInput, site: Site) -> Loader:
    """Return the loader of `data` by an index, the run's stored one if it has one."""
    # One rank lists and all use its listing, so that no two ranks see different shards.
    shards_by_source = site.on_rank0(lambda: discover_shards(data.section.train, data.field))
    return load_index(run, data, shards_by_source, site, f"{FOLDER}/{data.field}")
