"""Builds the index: splits shards into blocks and measures each block on one rank.

Guarantees: every rank returns the same index or raises the same error.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

from dist_ft.config.schema import DataSection
from dist_ft.core.errors import DataError, DistFtError
from dist_ft.core.logs import redact
from dist_ft.core.world import Collectives, World
from dist_ft.data.block import Block, ShardRange, group_into_blocks
from dist_ft.data.blocks import segments
from dist_ft.data.blocks.block_store import BlockStore
from dist_ft.data.blocks.index import Index, index_recipe
from dist_ft.data.blocks.segments import BlockStats
from dist_ft.data.sources import readers
from dist_ft.data.sources.discovery import Shard

T = TypeVar("T")

log = logging.getLogger(__name__)


def split_into_blocks(
    shards: Sequence[Sequence[Shard]], data: DataSection, world: World, collectives: Collectives
) -> tuple[Block, ...]:
    """Return the blocks of the `shards` of each source; one rank splits each shard.

    A collective call.
    """
    all_shards = [shard for source in shards for shard in source]
    block_bytes = max(1, round(data.block_mib * 2**20))

    # Some shards have to be read to find where to split them, so ranks share the work.
    ranges_by_shard = distribute(
        range(len(all_shards)),
        lambda number: readers.split_into_ranges(
            all_shards[number], number, block_bytes, data.max_row_bytes
        ),
        lambda number: all_shards[number].url,
        world,
        collectives,
    )

    # Grouping follows from the ranges alone: every rank does it and gets the same blocks.
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
        shards: shards of each source.
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

    # One iteration over all own blocks: the store tokenizes ahead while a block is measured.
    own_numbers = _own_blocks(store.blocks, world)
    own_blocks = store.iter_blocks(own_numbers)

    def measure_next(number: int) -> BlockStats:
        next_number, block = next(own_blocks)
        assert next_number == number  # `distribute` goes through the numbers in this order
        return segments.measure_block(block, data, sequence_length)

    stats_by_block = distribute(own_numbers, measure_next, url, world, collectives)

    if max_samples:
        limited = _limit_samples(stats_by_block, max_samples)

        def measure_again(number: int) -> BlockStats:
            max_rows = limited.max_rows[number]
            return segments.measure_block(store.block(number), data, sequence_length, max_rows)

        # Only the rank that has the cut block measures it, but all must take part in the exchange.
        own_cut = [number for number in own_numbers if number in limited.max_rows]
        measured_again = distribute(own_cut, measure_again, url, world, collectives)
        stats_by_block = {**limited.stats, **measured_again}

    shard_sources: list[int] = []
    for source, source_shards in enumerate(shards):
        shard_sources += [source] * len(source_shards)

    index = Index(
        shards=store.shards,
        shard_sources=tuple(shard_sources),
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

    own_numbers = []
    for number, block in enumerate(blocks):
        if block.ranges[0].shard % world.num_ranks == world.rank:
            own_numbers.append(number)
    return own_numbers


class _LimitedStats(NamedTuple):
    """Statistics of which only the first samples count.

    Attributes:
        stats: statistics by block; empty for blocks after the last sample.
        max_rows: how many rows count of the block that the last sample cuts (none if the samples
            end with a block), which has to be measured again.
    """

    stats: dict[int, BlockStats]
    max_rows: dict[int, int]


def _limit_samples(stats_by_block: dict[int, BlockStats], max_samples: int) -> _LimitedStats:
    """Limit statistics to the first `max_samples` rows."""
    limited: dict[int, BlockStats] = {}
    max_rows: dict[int, int] = {}

    # All blocks stay in the index: blocks of a later source keep their numbers.
    left = max_samples
    for number in sorted(stats_by_block):
        stats = stats_by_block[number]
        if left:
            limited[number] = stats
        else:
            limited[number] = segments.without_rows(stats)

        if 0 < left < stats.num_rows:
            max_rows[number] = left
        left = max(0, left - stats.num_rows)

    return _LimitedStats(limited, max_rows)


def distribute(
    numbers: Sequence[int],
    action: Callable[[int], T],
    name: Callable[[int], str],
    world: World,
    collectives: Collectives,
) -> dict[int, T]:
    """Return `action(number)` for the numbers of all ranks on all ranks. A collective call.

    Args:
        numbers: the numbers of this rank; a range is the same on every rank, and each takes its
            share of it.
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

    # Failures first: every rank makes this call, whether it failed or not. The lowest number wins,
    # so that the error is the one a single rank would have raised.
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
    num_left_out = index.total("num_left_out")
    num_bad = index.total("num_bad")  # these are among those that are left out

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
