"""The index: how a data set is split into blocks, and what each block holds.

It is the run's data manifest: built once (each block tokenized by one rank, statistics gathered)
and stored with the run, so that a resumed run plans the same steps without reading the data again.
Its size grows with shards and blocks, not with samples.

Guarantees: every rank holds the same index or raises the same error; a shard that has changed or
vanished since is refused by name.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, NoReturn, TypedDict, TypeVar

import numpy as np

from dist_ft.config.schema import DataSection
from dist_ft.core.errors import DataError, DistFtError
from dist_ft.core.logs import redact
from dist_ft.core.world import Collectives, World
from dist_ft.data.block import Block, ShardRange, group_into_blocks
from dist_ft.data.blocks import segments
from dist_ft.data.blocks.block_store import BlockStore
from dist_ft.data.blocks.segments import BlockStats
from dist_ft.data.sources import readers
from dist_ft.data.sources.discovery import Shard

T = TypeVar("T")
ADVICE = (
    "A run needs the data that it started with. Restore it, or start a run with another run.name."
)

log = logging.getLogger(__name__)


class IndexRecipe(TypedDict):
    """What determines an index besides its shards.

    Keys:
        encoder: fingerprint of the encoder.
        overlong, pack, block_mib: the data fields of these names.
        sequence_length: tokens of a sequence.
        max_samples: number of first rows that count; 0: all.
    """

    encoder: str
    overlong: str
    pack: bool
    block_mib: float
    sequence_length: int
    max_samples: int


class SampleLocation(NamedTuple):
    """A row of a shard; `row` counts from 0."""

    shard: Shard
    row: int


@dataclass(frozen=True)
class Index:
    """All blocks of a data set, source after source. Sample ids count rows over all blocks, from 0.

    Attributes:
        shards: the shards, source after source.
        shard_sources: the source of each shard.
        blocks: the blocks.
        block_stats: what each block holds.
        recipe: what else determines the index.
    """

    shards: tuple[Shard, ...]
    shard_sources: tuple[int, ...]
    blocks: tuple[Block, ...]
    block_stats: tuple[BlockStats, ...]
    recipe: IndexRecipe

    @property
    def first_samples(self) -> np.ndarray:
        """The first sample id of each block, then the number of samples, int64 (blocks + 1,)."""
        return np.cumsum([0, *(stats.num_rows for stats in self.block_stats)])

    @property
    def sources(self) -> np.ndarray:
        """The source of each block, int64 (blocks,)."""
        return np.array([block.source for block in self.blocks], dtype=np.int64)

    @property
    def counts(self) -> np.ndarray:
        """The number of sequences of each block, int64 (blocks,)."""
        return np.array([stats.num_sequences for stats in self.block_stats], dtype=np.int64)

    def total(self, name: str) -> int:
        """Return the sum of a field of `BlockStats` over all blocks."""
        return sum(int(getattr(stats, name)) for stats in self.block_stats)

    @property
    def num_samples(self) -> int:
        """Rows of all shards, including those that are left out."""
        return self.total("num_rows")

    def first_bad_row(self) -> str:
        """Return what was wrong with the first row that could not be used; empty: none."""
        return next((stats.first_bad for stats in self.block_stats if stats.first_bad), "")

    def locate_sample(self, sample: int) -> SampleLocation:
        """Return the shard and row of a sample."""
        first = self.first_samples
        number = int(np.searchsorted(first, sample, side="right")) - 1
        row = int(sample - first[number])  # within the block

        ranges = self.blocks[number].ranges
        for shard_range, num_rows in zip(
            ranges, self.block_stats[number].rows_per_range, strict=True
        ):
            if row < num_rows:
                shard_row = row + self._num_rows_before(shard_range)
                return SampleLocation(self.shards[shard_range.shard], shard_row)
            row -= num_rows
        raise ValueError(f"sample={sample}: there are {self.num_samples}")

    def _num_rows_before(self, shard_range: ShardRange) -> int:
        """Return the number of rows of the range's shard that precede it."""
        num_rows = 0
        for block, stats in zip(self.blocks, self.block_stats, strict=True):
            for other, count in zip(block.ranges, stats.rows_per_range, strict=True):
                if other.shard == shard_range.shard and other.start < shard_range.start:
                    num_rows += count
        return num_rows

    def verify_unchanged(self, shards: Sequence[Shard], field: str = "data.train") -> None:
        """Refuse, by name, data that differs from what was indexed.

        Raises:
            DataError: a shard was changed, removed, added or reordered.
        """
        found = {shard.url: shard for shard in shards}
        indexed = {shard.url for shard in self.shards}
        for shard in self.shards:
            if shard.url not in found:
                self._refuse(field, f"the shard {shard.url} vanished since the run started")
            if found[shard.url] != shard:
                self._refuse(field, f"the shard {shard.url} changed since the run started")
        for shard in shards:
            if shard.url not in indexed:
                self._refuse(field, f"the shard {shard.url} is new since the run started")
        if tuple(shards) != self.shards:
            self._refuse(field, "the shards are in another order than when the run started")

    @staticmethod
    def _refuse(field: str, problem: str) -> NoReturn:
        raise DataError(redact(f"{field}: {problem}. {ADVICE}"))

    def verify_recipe(self, recipe: IndexRecipe) -> None:
        """Refuse an index built with another tokenizer, template, overlong policy or length.

        Raises:
            DataError: names what differs.
        """
        stored: dict[str, object] = {**self.recipe}
        differences = [
            f"{name} was {stored.get(name)}, is {value}"
            for name, value in recipe.items()
            if value != stored.get(name)
        ]
        if differences:
            raise DataError(
                "data: samples become other tokens than when the run started "
                f"({'; '.join(differences)}). Tokenizer, template and data fields must not change. "
                "Restore them, or start a run with another run.name."
            )


def index_recipe(
    encoder_fingerprint: str, data: DataSection, sequence_length: int, max_samples: int = 0
) -> IndexRecipe:
    """Return what determines an index besides its shards."""
    return IndexRecipe(
        encoder=encoder_fingerprint,
        overlong=data.overlong,
        pack=data.pack,
        block_mib=data.block_mib,
        sequence_length=sequence_length,
        max_samples=max_samples,
    )


def split_into_blocks(
    shards: Sequence[Sequence[Shard]], data: DataSection, world: World, collectives: Collectives
) -> tuple[Block, ...]:
    """Return the blocks of the `shards` of each source; one rank splits each shard.

    A collective call.
    """
    all_shards = [shard for source in shards for shard in source]
    block_bytes = max(1, round(data.block_mib * 2**20))
    ranges_by_shard = _distribute(
        range(len(all_shards)),
        lambda number: readers.split_into_ranges(all_shards[number], number, block_bytes),
        lambda number: all_shards[number].url,
        world,
        collectives,
    )

    blocks: list[Block] = []
    first = 0
    for source, own_shards in enumerate(shards):
        ranges: list[ShardRange] = []
        for number in range(first, first + len(own_shards)):
            ranges += ranges_by_shard[number]
        blocks += group_into_blocks(source, ranges, block_bytes)
        first += len(own_shards)
    return tuple(blocks)


def build_index(
    shards: Sequence[Sequence[Shard]],
    store: BlockStore,
    data: DataSection,
    sequence_length: int,
    world: World,
    collectives: Collectives,
    max_samples: int = 0,
) -> Index:
    """Tokenize each block of `store` on one rank, and return the same index on every rank.

    A collective call.

    Args:
        shards: of each source.
        store: their blocks (`split_into_blocks`).
        data: how rows become sequences.
        sequence_length: tokens of a sequence.
        world: this rank.
        collectives: how ranks communicate.
        max_samples: only this number of first rows of all sources together counts; 0: all.

    Raises:
        DataError: on all ranks, with the same message, what any rank raised. `check_index` decides
            whether the data set can be trained on.
    """

    def url(number: int) -> str:
        return store.shards[store.blocks[number].ranges[0].shard].url

    own_numbers = _own_blocks(store.blocks, world)
    own_blocks = store.iter_blocks(own_numbers)

    def measure_next(number: int) -> BlockStats:
        next_number, block = next(own_blocks)
        assert next_number == number
        return segments.measure_block(block, data, sequence_length)

    stats_by_block = _distribute(own_numbers, measure_next, url, world, collectives)

    if max_samples:
        limited = _limit_samples(stats_by_block, max_samples)

        def measure_again(number: int) -> BlockStats:
            max_rows = limited.max_rows[number]
            return segments.measure_block(store.block(number), data, sequence_length, max_rows)

        own_cut = [number for number in own_numbers if number in limited.max_rows]
        measured_again = _distribute(own_cut, measure_again, url, world, collectives)
        stats_by_block = {**limited.stats, **measured_again}

    index = Index(
        shards=store.shards,
        shard_sources=tuple(i for i, source in enumerate(shards) for _ in source),
        blocks=store.blocks,
        block_stats=tuple(stats_by_block[i] for i in range(len(store.blocks))),
        recipe=index_recipe(store.fingerprint, data, sequence_length, max_samples),
    )
    if world.rank == 0:
        _log_left_out(index)
    return index


def _own_blocks(blocks: Sequence[Block], world: World) -> list[int]:
    """Return the blocks that this rank tokenizes.

    Those of whole shards, or, with fewer shards than ranks, neighboring blocks. Either way few
    ranks read what can be read in one pass.
    """
    num_shards = len({block.ranges[0].shard for block in blocks})
    if num_shards < world.num_ranks:
        return list(world.share(len(blocks)))
    return [
        number
        for number, block in enumerate(blocks)
        if block.ranges[0].shard % world.num_ranks == world.rank
    ]


class _LimitedStats(NamedTuple):
    """Statistics of which only the first samples count.

    Attributes:
        stats: by block; those after the last sample hold nothing.
        max_rows: how many rows count of the block that the last sample cuts (none if the samples
            end with a block), which has to be measured again.
    """

    stats: dict[int, BlockStats]
    max_rows: dict[int, int]


def _limit_samples(stats_by_block: dict[int, BlockStats], max_samples: int) -> _LimitedStats:
    """Limit statistics to the first `max_samples` rows."""
    limited: dict[int, BlockStats] = {}
    max_rows: dict[int, int] = {}
    left = max_samples
    for number in sorted(stats_by_block):
        stats = stats_by_block[number]
        limited[number] = stats if left else segments.without_rows(stats)
        if 0 < left < stats.num_rows:
            max_rows[number] = left
        left = max(0, left - stats.num_rows)
    return _LimitedStats(limited, max_rows)


def _distribute(
    numbers: Sequence[int],
    action: Callable[[int], T],
    name: Callable[[int], str],
    world: World,
    collectives: Collectives,
) -> dict[int, T]:
    """Return `action(number)` for the numbers of all ranks on all ranks. A collective call.

    Args:
        numbers: of this rank; a range is the same on every rank, and each takes its share of it.
        action: what to compute.
        name: names a number in errors.
        world: this rank.
        collectives: how ranks communicate.

    Raises:
        DistFtError: the failure with the lowest number, on all ranks.
    """
    own_numbers = numbers
    if isinstance(numbers, range):
        own_numbers = numbers[world.rank :: world.num_ranks]

    own: dict[int, T] = {}
    failure: tuple[int, DistFtError] | None = None
    for number in own_numbers:
        try:
            own[number] = action(number)
        except Exception as error:  # a rank that raised alone would leave the others waiting
            if isinstance(error, DistFtError):
                failure = (number, error)
            else:
                problem = f"cannot be read ({type(error).__name__}: {error})"
                failure = (number, DataError(redact(f"{name(number)}: {problem}")))
            break

    failures = [found for found in collectives.all_gather(failure) if found is not None]
    if failures:
        _, first_error = min(failures, key=lambda found: found[0])
        raise first_error

    results: dict[int, T] = {}
    for part in collectives.all_gather(own):
        results.update(part)
    return results


def _log_left_out(index: Index) -> None:
    """Warn about rows that are left out."""
    num_left_out, num_bad = index.total("num_left_out"), index.total("num_bad")
    if num_bad:
        log.warning(
            "data.bad_rows=skip: %d of %d rows cannot be used and are skipped; the first: %s",
            num_bad,
            index.num_samples,
            index.first_bad_row(),
        )
    if num_left_out > num_bad:
        log.warning(
            "%d of %d samples are left out: too long, or without a target token within "
            "batch.sequence_length=%d",
            num_left_out - num_bad,
            index.num_samples,
            index.recipe["sequence_length"],
        )
