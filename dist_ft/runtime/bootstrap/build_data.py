"""From a resolved run to its loaders: shards, encoder, blocks, index, batch plan.

The index is built on the first start and stored with the run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

from dist_ft.config.resolved_run import ResolvedRun
from dist_ft.config.schema import DataSection, ModelSection, RunConfig, Source
from dist_ft.core.world import Collectives, World, on_rank0
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
from dist_ft.data.sources.discovery import Shard, discover_shards
from dist_ft.model.loading.download import cache_folder
from dist_ft.model.loading.load import load_tokenizer
from dist_ft.storage.documents import MAX_LARGE_BYTES
from dist_ft.storage.filesystem import Store
from dist_ft.tasks.base import make_task

FOLDER = "data"
"""Folder of a run for its indexes, labels, few-shot templates and synonyms."""
TRAINING_FIELD = "data.train"


@dataclass(frozen=True)
class Loaders:
    """The loaders of a run over training data and held-out data (None without any).

    Attributes:
        is_new: whether the run had no index of its training data yet, or had lost it.
    """

    training: Loader
    evaluation: Loader | None
    is_new: bool

    def close(self) -> None:
        """Stop reading ahead."""
        self.training.store.close()
        if self.evaluation is not None:
            self.evaluation.store.close()


@dataclass(frozen=True)
class _Input:
    """What one loader reads.

    Attributes:
        field: config field that lists the sources; names the stored index.
        section: the sources, and how they are read.
        max_samples: read the first N samples; 0: all.
    """

    field: str
    section: DataSection
    max_samples: int = 0


def build_loaders(
    run: ResolvedRun, store: Store, world: World, collectives: Collectives
) -> Loaders:
    """Return the loaders of a run; a collective call.

    Every rank gets the same index or the same error.
    """
    index = f"{FOLDER}/{TRAINING_FIELD}.json"
    is_new = on_rank0(world, collectives, lambda: not store.exists(index))
    training = build_training_loader(run, store, world, collectives)

    evaluation = None
    if run.config.evaluation.data:
        evaluation = build_held_out_loader(
            run, run.config.evaluation.data, store, world, collectives
        )
    return Loaders(training, evaluation, is_new)


def build_training_loader(
    run: ResolvedRun, store: Store, world: World, collectives: Collectives
) -> Loader:
    """Return the loader over the training data; a collective call."""
    data = _Input(TRAINING_FIELD, run.config.effective_data)
    return _build_loader(run, data, store, world, collectives)


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
    data = _Input(
        "evaluation.data", _in_order(run.config, plain), run.config.evaluation.max_samples
    )

    return _build_loader(run, data, store, world, collectives)


def build_anchor_loader(
    run: ResolvedRun, store: Store, world: World, collectives: Collectives
) -> Loader:
    """Return the loader over tuning.anchor.data; a collective call. The caller closes its store."""
    anchor = run.config.tuning.anchor
    data = _Input("tuning.anchor.data", _in_order(run.config, anchor.data), anchor.max_samples)

    return _build_loader(run, data, store, world, collectives)


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

    return _block_store(config, section, Encoder(tokenizer, section), shards, blocks)


def _in_order(config: RunConfig, sources: tuple[Source, ...]) -> DataSection:
    """Return the data section for `sources`, read in their order and without a mixture."""
    return config.effective_data.model_copy(
        update={"shuffle": False, "train": sources, "mixing": (), "temperature": None}
    )


def _block_store(
    config: RunConfig,
    section: DataSection,
    encoder: Encoder,
    shards: Sequence[Shard],
    blocks: Sequence[Block],
) -> BlockStore:
    limit_bytes = section.cache_gib * 2**30
    pool = None
    if section.tokenizer_processes:
        # The pool's processes open storage themselves, so they need its options.
        pool = TokenizerPool(
            section.tokenizer_processes, encoder, limit_bytes, config.storage.options
        )

    # All runs of a node share this cache: its file names are hashes of everything in them.
    folder = cache_folder(config.data.cache_dir, "tokens")
    return BlockStore(folder, encoder, shards, blocks, pool, limit_bytes)


def _build_loader(
    run: ResolvedRun, data: _Input, store: Store, world: World, collectives: Collectives
) -> Loader:
    """Return the loader of `data`, with the run's stored index if it has one."""
    config, section = run.config, data.section
    length = config.batch.sequence_length
    encoder = make_encoder(run.tokenizer, section, run.task, length, run.prompting)

    # One rank lists and all use its listing, so that no two ranks see different shards.
    shards_by_source = on_rank0(
        world, collectives, lambda: discover_shards(section.train, data.field)
    )
    shards = tuple(chain.from_iterable(shards_by_source))

    name = f"{FOLDER}/{data.field}"
    index = on_rank0(world, collectives, lambda: index_file.load(store, name))

    # Held-out data may change over a run: its index is built again. Training data may not, because
    # the steps done so far would be those of other samples: it is refused below.
    may_change = data.field != TRAINING_FIELD
    if index is not None and may_change and not _is_current(index, shards, encoder, data, length):
        index = None

    if index is not None:
        # Shards first: the blocks of the index are ranges of the shards it was built from.
        index.verify_unchanged(shards, data.field)
        blocks = _block_store(config, section, encoder, shards, index.blocks)
        index.verify_recipe(index_recipe(blocks.fingerprint, section, length, data.max_samples))
    else:
        cuts = index_builder.split_into_blocks(shards_by_source, section, world, collectives)
        blocks = _block_store(config, section, encoder, shards, cuts)
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
    masking = None
    if make_task(run.task).masks_tokens:
        masking = Masking.from_task(run.tokenizer, run.task, config.run.seed)
    augmentation = _build_augmentation(run, data, store, world, collectives)

    return Loader(plan, index, blocks, section.prefetch_steps, masking, augmentation)


def _build_augmentation(
    run: ResolvedRun, data: _Input, store: Store, world: World, collectives: Collectives
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
    index: Index, shards: tuple[Shard, ...], encoder: Encoder, data: _Input, length: int
) -> bool:
    """Return whether a stored index is of these shards, read in this way."""
    from dist_ft.data.blocks.token_cache import compute_fingerprint

    # The block store has the same fingerprint, but none is built yet: it needs the blocks.
    recipe = index_recipe(compute_fingerprint(encoder), data.section, length, data.max_samples)

    return index.shards == shards and index.recipe == recipe
