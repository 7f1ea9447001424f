"""From shards to a loader by their index, which is built on the first start and stored.

Also what every loader needs: encoder, tokenizer processes, masking and augmentation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TypeVar

from dist_ft.config.resolved_run import ResolvedRun
from dist_ft.config.schema import DataSection, RunConfig
from dist_ft.core.world import Collectives, World, on_rank0
from dist_ft.data.batching.assemble import BatchBuilder
from dist_ft.data.batching.augmentation import Augmentation, read_synonym_file
from dist_ft.data.batching.loader import Loader
from dist_ft.data.batching.masking import Masking
from dist_ft.data.block import Block
from dist_ft.data.blocks import index_builder, index_file
from dist_ft.data.blocks.block_store import BlockStore
from dist_ft.data.blocks.index import Index, index_recipe
from dist_ft.data.blocks.index_checks import check_index
from dist_ft.data.blocks.tokenizer_pool import TokenizerPool
from dist_ft.data.encoding.chat import Encoder
from dist_ft.data.encoding.make_encoder import make_encoder
from dist_ft.data.sampling.batch_plan import BatchPlan
from dist_ft.data.sources.discovery import Shard
from dist_ft.model.loading.download import cache_folder
from dist_ft.storage.documents import MAX_LARGE_BYTES
from dist_ft.storage.filesystem import Store
from dist_ft.tasks.base import make_task

T = TypeVar("T")

FOLDER = "data"
"""Folder of a run for its indexes, labels, few-shot templates and synonyms."""
TRAINING_FIELD = "data.train"


@dataclass(frozen=True)
class DataInput:
    """What one loader reads.

    Attributes:
        field: config field that lists the sources; names the stored index.
        section: the sources, and how they are read.
        max_samples: read the first N samples; 0: all.
    """

    field: str
    section: DataSection
    max_samples: int = 0


@dataclass(frozen=True)
class Site:
    """Where a loader is built.

    Attributes:
        store: the run's folder.
        world: this rank.
        collectives: how ranks communicate.
    """

    store: Store
    world: World
    collectives: Collectives

    def on_rank0(self, action: Callable[[], T]) -> T:
        """Return the result of `action` on rank 0; all ranks raise its error."""
        return on_rank0(self.world, self.collectives, action)


def encoder_of(run: ResolvedRun, data: DataInput) -> Encoder:
    """Return what makes tokens of the rows of `data`."""
    length = run.config.batch.sequence_length
    return make_encoder(run.tokenizer, data.section, run.task, length, run.prompting)


def load_index(
    run: ResolvedRun,
    data: DataInput,
    shards_by_source: Sequence[Sequence[Shard]],
    site: Site,
    name: str,
) -> Loader:
    """Return the loader of shards, whose index is stored as `name`."""
    config, section = run.config, data.section
    store, world, collectives = site.store, site.world, site.collectives
    length = config.batch.sequence_length
    encoder = encoder_of(run, data)
    shards = tuple(chain.from_iterable(shards_by_source))
    index = on_rank0(world, collectives, lambda: index_file.load(store, name))

    # Held-out data may change over a run: its index is built again. Training data may not, because
    # the steps done so far would be those of other samples: it is refused below.
    may_change = data.field != TRAINING_FIELD
    if index is not None and may_change and not _is_current(index, shards, encoder, data, length):
        index = None

    if index is not None:
        # Shards first: the blocks of the index are ranges of the shards it was built from.
        index.verify_unchanged(shards, data.field)
        blocks = make_block_store(config, section, encoder, shards, index.blocks)
        index.verify_recipe(index_recipe(blocks.fingerprint, section, length, data.max_samples))
    else:
        cuts = index_builder.split_into_blocks(shards_by_source, section, world, collectives)
        blocks = make_block_store(config, section, encoder, shards, cuts)
        built = index_builder.build_index(
            shards_by_source, blocks, section, length, world, collectives, data.max_samples
        )

        # Check, then store: a stored index is not checked again by later starts.
        check_index(built, section, length)
        on_rank0(world, collectives, lambda: index_file.save(built, store, name))
        index = built

    # From here on a block whose tokens differ from the indexed ones is refused.
    blocks.checksums = [stats.checksum for stats in index.block_stats]

    plan = BatchPlan(index.counts, index.sources, section, config.batch, config.run.seed)
    return Loader(plan, index, blocks, section.prefetch_steps, make_batch_builder(run, data, site))


def make_batch_builder(run: ResolvedRun, data: DataInput, site: Site) -> BatchBuilder:
    """Return what builds batches of `data`; a collective call."""
    masking = None
    if make_task(run.task).masks_tokens:
        masking = Masking.from_task(run.tokenizer, run.task, run.config.run.seed)
    augmentation = _build_augmentation(run, data, site.store, site.world, site.collectives)
    return BatchBuilder(masking, augmentation)


def _build_augmentation(
    run: ResolvedRun, data: DataInput, store: Store, world: World, collectives: Collectives
) -> Augmentation | None:
    """Return the augmentation of `data`, None without any; a collective call."""
    # Held-out samples stay as they are: their losses must be comparable over a run.
    section = data.section
    is_default = section.augment == type(section.augment)()
    if data.field != TRAINING_FIELD or is_default:
        return None

    synonyms = on_rank0(world, collectives, lambda: _synonyms(section, store))
    return Augmentation.from_config(
        run.tokenizer,
        section.augment,
        run.task,
        run.config.batch.sequence_length,
        run.config.run.seed,
        synonyms,
    )


def _synonyms(section: DataSection, store: Store) -> str:
    """Return the text of the synonym file as it was when the run started (rank 0 only)."""
    path = section.augment.synonyms
    if path is None:
        return ""

    # A copy: a file that is edited later must not change the samples of a resumed run.
    stored = f"{FOLDER}/synonyms.tsv"
    if not store.exists(stored):
        store.write(stored, read_synonym_file(path).encode())
    return store.read_at_most(stored, MAX_LARGE_BYTES).decode()


def _is_current(
    index: Index, shards: tuple[Shard, ...], encoder: Encoder, data: DataInput, length: int
) -> bool:
    """Return whether a stored index is of these shards, read in this way."""
    from dist_ft.data.blocks.token_cache import compute_fingerprint

    # The block store has the same fingerprint, but none is built yet: it needs the blocks.
    recipe = index_recipe(compute_fingerprint(encoder), data.section, length, data.max_samples)

    return index.shards == shards and index.recipe == recipe


def make_block_store(
    config: RunConfig,
    section: DataSection,
    encoder: Encoder,
    shards: Sequence[Shard],
    blocks: Sequence[Block],
) -> BlockStore:
    """Return the tokenized blocks of a data section, not read yet."""
    # All runs of a node share this cache: its file names are hashes of everything in them.
    folder = cache_folder(config.data.cache_dir, "tokens")
    pool = make_tokenizer_pool(config, section, encoder)
    return BlockStore(folder, encoder, shards, blocks, pool, section.cache_gib * 2**30)


def make_tokenizer_pool(
    config: RunConfig, section: DataSection, encoder: Encoder
) -> TokenizerPool | None:
    """Return the processes that tokenize; None if the worker does."""
    if not section.tokenizer_processes:
        return None

    # The pool's processes open storage themselves, so they need its options.
    limit_bytes = section.cache_gib * 2**30
    return TokenizerPool(section.tokenizer_processes, encoder, limit_bytes, config.storage.options)
