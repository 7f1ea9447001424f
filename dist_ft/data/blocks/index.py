"""The index: how a data set falls into blocks, and what each block holds. It is the run's data manifest.

Made once (each block tokenised by one rank, numbers gathered) and stored with the run, so that a resumed run plans the
same steps without reading the data again. Guarantees: every rank holds the same index or raises the same error; a
shard that changed or vanished since is refused by name. Its size grows with shards and blocks, not with samples.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from dist_ft.config.schema import DataSection
from dist_ft.core.errors import DataError, DistFtError
from dist_ft.core.logs import redact
from dist_ft.core.world import Collectives, World
from dist_ft.data.block import Block, ShardRange, group_into_blocks
from dist_ft.data.blocks import segments as cutting
from dist_ft.data.blocks.block_store import BlockStore
from dist_ft.data.blocks.segments import BlockStats
from dist_ft.data.sources import readers
from dist_ft.data.sources.discovery import Shard

T = TypeVar("T")
ADVICE = "a run keeps the data it began with; restore it, or start a run with another run.name"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Index:
    """All blocks of a data set, source after source. Sample ids count rows over all blocks, from 0.

    Attributes:
        shards: the shards, source after source.
        shard_sources: the source of each shard.
        blocks: the blocks.
        measures: what each block holds.
        recipe: what decided all this besides the shards: encoder fingerprint, overlong policy, sequence length ...
    """

    shards: tuple[Shard, ...]
    shard_sources: tuple[int, ...]
    blocks: tuple[Block, ...]
    measures: tuple[BlockStats, ...]
    recipe: dict[str, Any]

    @property
    def first_samples(self) -> np.ndarray:
        """Return the first sample id of each block and the number of samples, int64 (blocks + 1,)."""
        return np.cumsum([0, *(measure.num_rows for measure in self.measures)])

    @property
    def sources(self) -> np.ndarray:
        """Return the source of each block, int64 (blocks,)."""
        return np.array([block.source for block in self.blocks], dtype=np.int64)

    @property
    def counts(self) -> np.ndarray:
        """Return the sequences of each block, int64 (blocks,)."""
        return np.array([measure.num_sequences for measure in self.measures], dtype=np.int64)

    def total(self, name: str) -> int:
        """Return the sum of a field of `Measures` over all blocks."""
        return sum(int(getattr(measure, name)) for measure in self.measures)

    @property
    def num_samples(self) -> int:
        """Rows of all shards, those left out too."""
        return self.total("num_rows")

    def locate_sample(self, sample: int) -> tuple[Shard, int]:
        """Return the shard of a sample and its row there, from 0."""
        first = self.first_samples
        number = int(np.searchsorted(first, sample, side="right")) - 1
        row = int(sample - first[number])
        for part, rows in zip(
            self.blocks[number].parts, self.measures[number].part_rows, strict=True
        ):
            if row < rows:
                return self.shards[part.shard], row + self._rows_before(part)
            row -= rows
        raise ValueError(f"sample={sample}: there are {self.num_samples}")

    def _rows_before(self, wanted: ShardRange) -> int:
        """Return how many rows of its shard lie before a part."""
        return sum(
            rows
            for block, measure in zip(self.blocks, self.measures, strict=True)
            for part, rows in zip(block.parts, measure.part_rows, strict=True)
            if part.shard == wanted.shard and part.start < wanted.start
        )

    def verify_unchanged(self, shards: Sequence[Shard], field: str = "data.train") -> None:
        """Refuse, by name, data that is not what was indexed.

        Raises:
            DataError: a shard was changed, removed, added or moved in order.
        """
        now = {shard.url: shard for shard in shards}
        then = {shard.url for shard in self.shards}
        for shard in self.shards:
            if shard.url not in now:
                raise DataError(
                    redact(f"{field}: the shard {shard.url} vanished since the run began; {ADVICE}")
                )
            if now[shard.url] != shard:
                raise DataError(
                    redact(f"{field}: the shard {shard.url} changed since the run began; {ADVICE}")
                )
        for shard in shards:
            if shard.url not in then:
                raise DataError(
                    redact(f"{field}: the shard {shard.url} is new since the run began; {ADVICE}")
                )
        if tuple(shards) != self.shards:
            raise DataError(
                f"{field}: the shards are in another order than when the run began; {ADVICE}"
            )

    def verify_recipe(self, wanted: dict[str, Any]) -> None:
        """Refuse an index made with another tokenizer, template, overlong policy or sequence length.

        Raises:
            DataError: names what differs.
        """
        differing = [name for name in wanted if wanted[name] != self.recipe.get(name)]
        if differing:
            what = "; ".join(
                f"{name} was {self.recipe.get(name)}, is {wanted[name]}" for name in differing
            )
            raise DataError(
                f"data: samples become other tokens than when the run began ({what}); tokenizer, template "
                "and data fields may not change; restore them, or start a run with another run.name"
            )


def recipe(
    encoder_fingerprint: str, data: DataSection, sequence_length: int, max_samples: int = 0
) -> dict[str, Any]:
    """Return what decides an index besides its shards."""
    return {
        "encoder": encoder_fingerprint,
        "overlong": data.overlong,
        "pack": data.pack,
        "block_mib": data.block_mib,
        "sequence_length": sequence_length,
        "max_samples": max_samples,
    }


def split_into_blocks(
    shards: Sequence[Sequence[Shard]], data: DataSection, world: World, collectives: Collectives
) -> tuple[Block, ...]:
    """Return the blocks of sources' `shards`; each shard is surveyed by one rank. A collective call."""
    flat = [shard for source in shards for shard in source]
    block_bytes = max(1, round(data.block_mib * 2**20))
    found = _shared_out(
        range(len(flat)),
        lambda number: readers.find_parts(flat[number], number, block_bytes),
        lambda number: flat[number].url,
        world,
        collectives,
    )
    blocks: list[Block] = []
    first = 0
    for source, own in enumerate(shards):
        parts = [part for number in range(first, first + len(own)) for part in found[number]]
        blocks += group_into_blocks(source, parts, block_bytes)
        first += len(own)
    return tuple(blocks)


def build(
    shards: Sequence[Sequence[Shard]],
    store: BlockStore,
    data: DataSection,
    sequence_length: int,
    world: World,
    collectives: Collectives,
    max_samples: int = 0,
) -> Index:
    """Tokenise every block of `store` on one rank, exchange numbers, return the same index on every rank.

    Args:
        shards: of each source.
        store: their blocks (`cut_into_blocks`).
        data: how rows become sequences.
        sequence_length: tokens a sequence.
        world: this rank.
        collectives: how ranks talk.
        max_samples: only so many first rows of all sources together count; 0: all.

    Raises:
        DataError: on all ranks with the same text what any rank met. Whether the whole may be trained on is
            `judge`'s business.
    """

    def url(number: int) -> str:
        return store.shards[store.blocks[number].parts[0].shard].url

    own = _own_share(store.blocks, world)
    made = store.each(own)
    measures = _shared_out(
        own,
        lambda number: _measure(next(made), number, data, sequence_length),
        url,
        world,
        collectives,
    )
    if max_samples:
        short, left = _limited(measures, max_samples)
        again = _shared_out(
            [number for number in own if number in left],
            lambda number: cutting.measure(
                store.block(number), data, sequence_length, left[number]
            ),
            url,
            world,
            collectives,
        )
        measures = {**short, **again}
    found = Index(
        store.shards,
        tuple(i for i, source in enumerate(shards) for _ in source),
        store.blocks,
        tuple(measures[i] for i in range(len(store.blocks))),
        recipe(store.fingerprint, data, sequence_length, max_samples),
    )
    if world.rank == 0:
        _report(found)
    return found


def _own_share(blocks: Sequence[Block], world: World) -> list[int]:
    """Return the blocks this rank tokenises: whole shards, or, of fewer shards than ranks, blocks side by side.

    Either way what is read in one pass is read by few ranks.
    """
    return (
        [
            number
            for number, block in enumerate(blocks)
            if block.parts[0].shard % world.num_ranks == world.rank
        ]
        if len({block.parts[0].shard for block in blocks}) >= world.num_ranks
        else list(world.share(len(blocks)))
    )


def _measure(
    made: tuple[int, Any], number: int, data: DataSection, sequence_length: int
) -> BlockStats:
    assert made[0] == number
    return cutting.measure(made[1], data, sequence_length)


def _limited(
    measures: dict[int, BlockStats], max_samples: int
) -> tuple[dict[int, BlockStats], dict[int, int]]:
    """Return the measures of the first `max_samples` rows, and how many rows count of the block they end in, if any.

    That block (as a rule one) has to be measured again; blocks after it hold nothing.
    """
    limited, cut, left = {}, {}, max_samples
    for number in sorted(measures):
        limited[number] = measures[number] if left else cutting.without_rows(measures[number])
        if 0 < left < measures[number].num_rows:
            cut[number] = left
        left = max(0, left - measures[number].num_rows)
    return limited, cut


def _shared_out(
    numbers: Sequence[int],
    action: Callable[[int], T],
    name: Callable[[int], str],
    world: World,
    collectives: Collectives,
) -> dict[int, T]:
    """Return `action(number)` of all ranks' numbers on all ranks; the first failure is raised on all.

    With `numbers` being the same range everywhere each rank takes its share of it.
    """
    mine = numbers[world.rank :: world.num_ranks] if isinstance(numbers, range) else numbers
    own: dict[int, T] = {}
    failure: tuple[int, DistFtError] | None = None
    for number in mine:
        try:
            own[number] = action(number)
        except Exception as error:  # a rank that raised alone would leave the others waiting
            told = (
                error
                if isinstance(error, DistFtError)
                else DataError(
                    redact(f"{name(number)}: can not be read ({type(error).__name__}: {error})")
                )
            )
            failure = (number, told)
            break
    failures = [found for found in collectives.all_gather(failure) if found is not None]
    if failures:
        raise min(failures, key=lambda found: found[0])[1]
    gathered: dict[int, T] = {}
    for part in collectives.all_gather(own):
        gathered.update(part)
    return gathered


def _report(found: Index) -> None:
    """Log what was left out."""
    left_out, bad = found.total("num_left_out"), found.total("num_bad")
    if bad:
        first = next(measure.first_bad for measure in found.measures if measure.first_bad)
        log.warning(
            "data.bad_rows=skip: %d of %d rows can not be used and are left out; the first: %s",
            bad,
            found.num_samples,
            first,
        )
    if left_out > bad:
        log.warning(
            "%d of %d samples are left out: too long, or nothing to learn within batch.sequence_length=%d",
            left_out - bad,
            found.num_samples,
            found.recipe["sequence_length"],
        )
