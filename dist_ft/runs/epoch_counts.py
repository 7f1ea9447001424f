"""Counts the segments of each epoch of each source in a ledger, streamed or indexed.

N is the number of rows of a ledger.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dist_ft.checkpoint.ledger import LedgerRows
from dist_ft.config.schema import RunConfig
from dist_ft.core.errors import DataError
from dist_ft.core.logs import redact
from dist_ft.data.blocks.index import ADVICE, Index
from dist_ft.data.blocks.slices import SAMPLE_BITS
from dist_ft.data.blocks.stream_file import StreamDescription
from dist_ft.data.sources.discovery import Shard


@dataclass(frozen=True)
class EpochCount:
    """Counts of one epoch of one source.

    Attributes:
        source: name of the source.
        epoch: number of the epoch, from 0.
        num_segments: segments the source holds.
        num_seen: segments in the ledger.
        num_repeated: segments in the ledger more than once.
        num_lost: segments missing from an epoch that all lanes have passed.
    """

    source: str
    epoch: int
    num_segments: int
    num_seen: int
    num_repeated: int
    num_lost: int

    @property
    def is_sound(self) -> bool:
        """Whether no segment is repeated or lost."""
        return not self.num_repeated and not self.num_lost


def count_indexed_source(
    rows: np.ndarray, index: Index, config: RunConfig, source: int, num_whole_epochs: int
) -> list[EpochCount]:
    """Return the counts of the epochs of an indexed source.

    Args:
        rows: (N, 6) int64, see `checkpoint.ledger.COLUMNS`.
        index: the run's index.
        config: the run's config.
        source: number of the source.
        num_whole_epochs: epochs that all lanes have passed.
    """
    # A ledger row does not name its source. Sample numbers are consecutive over all blocks, so the
    # last block that starts at or before a sample holds it.
    blocks = np.searchsorted(index.first_samples, rows[:, 3], side="right") - 1  # (N,)
    own_rows = rows[index.sources[blocks] == source]

    num_segments = 0
    for block, stats in zip(index.blocks, index.block_stats, strict=True):
        if block.source == source:
            num_segments += stats.num_segments
    return _count_epochs(own_rows, _name(config, source), num_segments, num_whole_epochs)


def count_stream_epochs(
    history: LedgerRows,
    description: StreamDescription,
    rest: Index | None,
    config: RunConfig,
    cursors: np.ndarray,
) -> list[EpochCount]:
    """Return the counts of every epoch of every source of a streamed run.

    Args:
        history: rows and facts of slices.
        description: how the sources are cut.
        rest: index of the sources that do not stream; None without any.
        config: the run's config.
        cursors: int64 (n, 6) where the lanes are: lane, source, epoch, first, doubling, draws.

    Raises:
        DataError: a slice was read with different tokens at different times.
    """
    facts = np.unique(history.slices, axis=0)  # (M, 5)
    numbers, times = np.unique(facts[:, 0], return_counts=True)
    if (times > 1).any():
        raise DataError(
            f"data.train: {int((times > 1).sum())} slices, such as slice {numbers[times > 1][0]}, "
            f"were read with different tokens at different times. {ADVICE}"
        )

    slice_of_row = (history.samples[:, 3] >> SAMPLE_BITS) - 1  # (N,), -1: of an indexed source
    counts = []
    first = 0
    for source in range(len(config.data.train)):
        own_cursors = cursors[cursors[:, 1] == source]
        layout = description.layouts.get(source)
        if layout is None:
            assert rest is not None
            # a lane's cursor counts its own draws of an indexed source
            num_drawn = 0
            if len(own_cursors) == config.num_lanes:
                num_drawn = int(own_cursors[:, 3].min()) * config.num_lanes
            num_sequences = int(rest.counts[rest.sources == source].sum())
            counts += count_indexed_source(
                history.samples[slice_of_row < 0],
                rest,
                config,
                source,
                num_drawn // max(1, num_sequences),
            )
            continue

        is_own = (slice_of_row >= first) & (slice_of_row < first + layout.num_slices)
        own_facts = facts[(facts[:, 0] >= first) & (facts[:, 0] < first + layout.num_slices)]
        first += layout.num_slices

        # A lane that never drew from the source has no cursor: no epoch is passed by all lanes.
        num_passed = 0
        if len(own_cursors) == config.num_lanes:
            num_passed = int(own_cursors[:, 2].min())
        num_unread = layout.num_slices - len(own_facts)
        counts += _count_epochs(
            history.samples[is_own],
            _name(config, source),
            int(own_facts[:, 3].sum()),
            num_passed,
            num_unread,
        )
    return counts


def verify_streamed_shards(
    description: StreamDescription, shards_by_source: Sequence[Sequence[Shard]]
) -> int:
    """Compare the listing of a streamed run's data with its description.

    Returns:
        The number of shards.

    Raises:
        DataError: a source has another number of bytes than when the run started.
    """
    for source, layout in description.layouts.items():
        shards = shards_by_source[source]
        num_bytes = sum(shard.size for shard in shards)
        if num_bytes != layout.num_bytes:
            raise DataError(
                redact(
                    f"data.train: the shards of {shards[0].url} and its neighbors have "
                    f"{num_bytes:,} bytes, and {layout.num_bytes:,} when the run started. {ADVICE}"
                )
            )
    return sum(map(len, shards_by_source))


def _name(config: RunConfig, source: int) -> str:
    return config.data.train[source].name or f"source-{source}"


def _count_epochs(
    rows: np.ndarray, name: str, num_segments: int, num_whole_epochs: int, num_unread: int = 0
) -> list[EpochCount]:
    """Return the counts of a source.

    Args:
        rows: (N, 6) its rows.
        name: its name.
        num_segments: segments that it holds, as far as it was read.
        num_whole_epochs: epochs that all lanes have passed.
        num_unread: slices of which nothing is known. In a passed epoch each of them is a loss.
    """
    counts = []
    # An epoch without any row is counted too if it must be complete: all of it was lost.
    num_started_epochs = int(rows[:, 1].max(initial=-1)) + 1
    for epoch in range(max(num_whole_epochs, num_started_epochs)):
        # A long sample is split into several segments, so its number alone is not unique.
        segments = rows[rows[:, 1] == epoch][:, 3:5]  # sample, first token
        num_distinct = len(np.unique(segments, axis=0))

        # The rest of the epoch that is in progress is not lost, only not read yet.
        num_lost = 0
        if epoch < num_whole_epochs:
            num_lost = num_segments - num_distinct + num_unread

        counts.append(
            EpochCount(
                name,
                epoch,
                num_segments,
                len(segments),
                len(segments) - num_distinct,
                num_lost,
            )
        )
    return counts
