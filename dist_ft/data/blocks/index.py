"""The index: how a data set is split into blocks, and what each block holds.

It is the run's data manifest: built once (`index_builder`) and stored with the run, so that a
resumed run plans the same steps without reading the data again. Its size grows with shards and
blocks, not with samples. A shard that has changed or vanished since is refused by name.

Arrays have one dimension: the blocks, source after source.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, NoReturn, TypedDict

import numpy as np

from dist_ft.config.schema import DataSection
from dist_ft.core.errors import DataError
from dist_ft.core.logs import redact
from dist_ft.data.block import Block, ShardRange
from dist_ft.data.blocks.segments import BlockStats
from dist_ft.data.sources.discovery import Shard

ADVICE = (
    "A run needs the data that it started with. Restore it, or start a run with another run.name."
)


class IndexRecipe(TypedDict):
    """What determines an index apart from its shards.

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
        for stats in self.block_stats:
            if stats.first_bad:
                return stats.first_bad
        return ""

    def locate_sample(self, sample: int) -> SampleLocation:
        """Return the shard and row of a sample."""
        # "right": the first id of a block belongs to it, not to the block before
        first = self.first_samples  # (blocks + 1,)
        number = int(np.searchsorted(first, sample, side="right")) - 1
        row = int(sample - first[number])  # within the block

        ranges = self.blocks[number].ranges
        rows_per_range = self.block_stats[number].rows_per_range
        for shard_range, num_rows in zip(ranges, rows_per_range, strict=True):
            if row < num_rows:
                shard_row = row + self._num_rows_before(shard_range)
                return SampleLocation(self.shards[shard_range.shard], shard_row)
            row -= num_rows

        raise ValueError(f"sample={sample}: the data set has {self.num_samples} samples")

    def _num_rows_before(self, shard_range: ShardRange) -> int:
        """Return the number of rows of the range's shard that precede it."""
        # Ranges by bytes do not say which row they start with. The ranges of a shard may be in
        # several blocks, so all are searched: this serves messages, not training.
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

        # The most specific problem first: one changed shard, then a new one, then the order.
        for shard in self.shards:
            if shard.url not in found:
                self._refuse(field, f"the shard {shard.url} vanished since the run started")
            if found[shard.url] != shard:
                self._refuse(field, f"the shard {shard.url} changed since the run started")

        for shard in shards:
            if shard.url not in indexed:
                self._refuse(field, f"the shard {shard.url} is new since the run started")

        # sample ids count rows over the shards in order
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
        differences = []
        for name, value in recipe.items():
            # a stored index may lack a key that a later version added
            if value != stored.get(name):
                differences.append(f"{name} was {stored.get(name)}, is {value}")

        if differences:
            raise DataError(
                "data: samples become other tokens than when the run started "
                f"({'; '.join(differences)}). Tokenizer, template and data fields must not change. "
                "Restore them, or start a run with another run.name."
            )


def index_recipe(
    encoder_fingerprint: str, data: DataSection, sequence_length: int, max_samples: int = 0
) -> IndexRecipe:
    """Return what determines an index apart from its shards."""
    return IndexRecipe(
        encoder=encoder_fingerprint,
        overlong=data.overlong,
        pack=data.pack,
        block_mib=data.block_mib,
        sequence_length=sequence_length,
        max_samples=max_samples,
    )
