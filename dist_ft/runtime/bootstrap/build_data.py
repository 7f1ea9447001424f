"""From config to loaders: shards, tokenizer, blocks, index (made once, stored with the run), plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dist_ft.config.schema import DataSection, RunConfig, Source
from dist_ft.core.world import Collectives, World, on_rank0
from dist_ft.data.batching.augmentation import Augmentation, read_file
from dist_ft.data.batching.loader import Loader
from dist_ft.data.batching.masking import Masking
from dist_ft.data.block import Block
from dist_ft.data.blocks import index as indices
from dist_ft.data.blocks import index_file
from dist_ft.data.blocks.block_store import BlockStore
from dist_ft.data.blocks.index import Index
from dist_ft.data.blocks.index_checks import check_index
from dist_ft.data.blocks.tokenizer_pool import TokenizerPool
from dist_ft.data.encoding.chat import Encoder
from dist_ft.data.encoding.make_encoder import (
    make_encoder,
)
from dist_ft.data.sampling.batch_plan import BatchPlan
from dist_ft.data.sources.discovery import Shard, discover_shards
from dist_ft.model.loading.download import cache_folder
from dist_ft.model.loading.load import load_tokenizer
from dist_ft.runtime.bootstrap.few_shot_examples import (
    with_examples,
)
from dist_ft.runtime.bootstrap.labels import with_labels
from dist_ft.storage.filesystem import Store

FOLDER = "data"


@dataclass(frozen=True)
class Data:
    """What a run reads: its tokenizer, and a loader over training and held-out data (None without any).

    Attributes:
        config: the run's, with the labels of its task filled in.
    """

    config: RunConfig
    tokenizer: Any
    training: Loader
    evaluation: Loader | None

    def close(self) -> None:
        """End what reads ahead."""
        self.training.store.close()
        if self.evaluation is not None:
            self.evaluation.store.close()


def open_data(config: RunConfig, store: Store, world: World, collectives: Collectives) -> Data:
    """Return the loaders of a run; a collective call. Every rank ends with the same index or the same error."""
    tokenizer = load_tokenizer(config.model, config.data.cache_dir)
    config = with_examples(
        with_labels(config, store, world, collectives), store, world, collectives
    )
    training = _loader(config, config.reading, "data.train", tokenizer, store, world, collectives)
    evaluation = (
        open_held_out(config, tokenizer, store, world, collectives)
        if config.evaluation.data
        else None
    )
    return Data(config, tokenizer, training, evaluation)


def open_held_out(
    config: RunConfig, tokenizer: Any, store: Store, world: World, collectives: Collectives
) -> Loader:
    """Return the loader of held-out data alone; labels and examples must be in the config. A collective call."""
    plain = tuple(
        Source(path=s.path, subset=s.subset, split=s.split) for s in config.evaluation.data
    )
    section = config.reading.model_copy(
        update={"shuffle": False, "train": plain, "mixing": (), "temperature": None}
    )
    return _loader(
        config,
        section,
        "evaluation.data",
        tokenizer,
        store,
        world,
        collectives,
        config.evaluation.max_samples,
    )


def open_anchor(
    config: RunConfig, tokenizer: Any, store: Store, world: World, collectives: Collectives
) -> Loader:
    """Return the loader of tuning.anchor.data; a collective call. Its store is to be closed."""
    section = config.reading.model_copy(
        update={
            "shuffle": False,
            "train": config.tuning.anchor.data,
            "mixing": (),
            "temperature": None,
        }
    )
    return _loader(
        config,
        section,
        "tuning.anchor.data",
        tokenizer,
        store,
        world,
        collectives,
        config.tuning.anchor.max_samples,
    )


def open_blocks(config: RunConfig) -> BlockStore:
    """Return the training data's blocks, not read yet, for work on its rows (or their tokens, if it is causal_lm)."""
    tokenizer = load_tokenizer(config.model, config.data.cache_dir)
    shards = discover_shards(config.data.train)
    blocks = indices.split_into_blocks(shards, config.data, World(), Collectives())
    return _store(
        config,
        config.data,
        Encoder(tokenizer, config.data),
        [s for found in shards for s in found],
        blocks,
    )


def _store(
    config: RunConfig,
    section: DataSection,
    encoder: Encoder,
    shards: Sequence[Shard],
    blocks: Sequence[Block],
) -> BlockStore:
    limit, processes = section.cache_gib * 2**30, section.tokenizer_processes
    pool = TokenizerPool(processes, encoder, limit, config.storage.options) if processes else None
    return BlockStore(
        cache_folder(config.data.cache_dir) / "tokens", encoder, shards, blocks, pool, limit
    )


def _loader(
    config: RunConfig,
    section: DataSection,
    field: str,
    tokenizer: Any,
    store: Store,
    world: World,
    collectives: Collectives,
    max_samples: int = 0,
) -> Loader:
    """Return the loader over a section's sources, with the run's stored index if there is one."""
    length, name = config.batch.sequence_length, f"{FOLDER}/{field}"
    encoder = make_encoder(tokenizer, section, config.task, length, config.prompting)
    shards = on_rank0(world, collectives, lambda: discover_shards(section.train, field))
    flat = tuple(shard for source in shards for shard in source)
    index = on_rank0(world, collectives, lambda: index_file.load(store, name))
    if index is not None and (
        field == "data.train" or _fits(index, flat, encoder, section, length, max_samples)
    ):
        index.verify_unchanged(flat, field)
        blocks = _store(config, section, encoder, flat, index.blocks)
        index.verify_recipe(indices.recipe(blocks.fingerprint, section, length, max_samples))
    else:
        cuts = indices.split_into_blocks(shards, section, world, collectives)
        blocks = _store(config, section, encoder, flat, cuts)
        index = indices.build(shards, blocks, section, length, world, collectives, max_samples)
        check_index(index, section, length)
        made = index
        on_rank0(world, collectives, lambda: index_file.save(made, store, name))
    blocks.checksums = [measure.checksum for measure in index.measures]
    plan = BatchPlan(index.counts, index.sources, section, config.batch, config.run.seed)
    masking = (
        Masking.of(tokenizer, config.task, config.run.seed)
        if config.task.name == "masked_lm"
        else None
    )
    augmenting = None
    if field == "data.train" and section.augment != type(section.augment)():
        synonyms = on_rank0(world, collectives, lambda: _synonyms(section, store))
        augmenting = Augmentation.of(
            tokenizer, section.augment, config.task, length, config.run.seed, synonyms
        )
    return Loader(plan, index, blocks, section.prefetch_steps, masking, augmenting)


def _synonyms(section: DataSection, store: Store) -> str:
    """Return the run's synonyms: as they were when it began (rank 0 only)."""
    path, kept = section.augment.synonyms, f"{FOLDER}/synonyms.tsv"
    if path is None:
        return ""
    if not store.exists(kept):
        store.write(kept, read_file(path).encode())
    return store.read(kept).decode()


def _fits(
    index: Index,
    shards: tuple[Any, ...],
    encoder: Encoder,
    section: DataSection,
    length: int,
    max_samples: int,
) -> bool:
    """Tell whether a stored index of held-out data (which may change over a run) is still the right one."""
    from dist_ft.data.blocks.token_cache import fingerprint

    wanted = indices.recipe(fingerprint(encoder), section, length, max_samples)
    return index.shards == shards and index.recipe == wanted
