"""The batch plan: which sequence of which block is in which lane at every step of a run.

A pure function of the index's counts, config, step and lane. Its cost grows with the number of
blocks, not of samples or ranks.

The sequences of a source have positions in an epoch: its blocks in an order by seed and epoch,
window after window of blocks, with the sequences of each window shuffled. With shuffling, each lane
walks through a stretch of positions of its own, so that it reads few blocks at a time; without,
every step takes the next positions. With `data.bucket`, neighboring sequences of a block have
similar lengths, and whole micro-batches of them are shuffled.

Guarantees: each position occurs once in an epoch of its source; nothing depends on the number of
workers. Knows no tokens and no lengths.

N is the number of blocks of all sources, or of one source in `_BlockOrder`; W the number of windows
of a source.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from threading import Lock
from typing import NamedTuple

import numpy as np

from dist_ft.config.schema import BatchSection, DataSection, ScheduleSection
from dist_ft.core.seeds import derive_seed, random_uint64
from dist_ft.data.sampling.mixture import ENDLESS, Mixture, is_weighted
from dist_ft.data.sampling.shuffle import epoch_order

_CACHED_EPOCHS = 8
"""Cached block orders for each source."""
_CACHED_WINDOWS = 64


@dataclass(frozen=True)
class SequenceRef:
    """Where the sequence at one place of the global batch comes from.

    Attributes:
        source: number of the source.
        epoch: epoch of that source, from 0.
        block: number of the block in the index.
        sequence: number of the sequence within the packed block.
    """

    source: int
    epoch: int
    block: int
    sequence: int


class EpochStep(NamedTuple):
    """A step of the run.

    Attributes:
        epoch: epoch of the run, from 0; `ENDLESS` with weights.
        step: within that epoch, from 0.
    """

    epoch: int
    step: int


class _BlockOrder(NamedTuple):
    """The order of a source's N blocks in an epoch.

    Attributes:
        blocks: int64 (N,) block numbers within the source, in order.
        ends: int64 (N,) the position after each block's sequences.
        window_ends: int64 (W,) the position after each window of blocks.
    """

    blocks: np.ndarray
    ends: np.ndarray
    window_ends: np.ndarray


class BatchPlan:
    """The steps of a run, counted from 0."""

    def __init__(
        self,
        counts: np.ndarray,
        sources: np.ndarray,
        data: DataSection,
        batch: BatchSection,
        seed: int,
    ) -> None:
        """Store the counts; compute nothing yet.

        Args:
            counts: (N,) number of sequences of each block.
            sources: (N,) source of each block, ascending: a source's blocks are consecutive.
            data: shuffling and mixing.
            batch: sizes of the global batch and of a micro-batch.
            seed: seed of the run.
        """
        self.data = data
        self.batch = batch
        self.seed = seed
        self.num_lanes = batch.global_batch // batch.micro_batch
        self._shuffle_unit = 1
        if data.bucket and not data.pack:
            # Sequences of similar length lie next to each other. Moving them one by one would mix
            # the lengths of a micro-batch again.
            self._shuffle_unit = batch.micro_batch

        edges = np.searchsorted(sources, np.arange(len(data.train) + 1))
        self._first_block = edges[:-1].tolist()  # of each source
        self._counts = [counts[start:stop].astype(np.int64) for start, stop in pairwise(edges)]
        self._sizes = [int(own.sum()) for own in self._counts]

        mixture_seed = derive_seed(seed, len(self._sizes))
        self.mixture = Mixture(data, self._sizes, self.num_lanes, batch.micro_batch, mixture_seed)
        self._endless = is_weighted(data)

        # The first step of each epoch of the run, extended as needed. Locked, as the loader's
        # thread looks up steps while the trainer reads its progress.
        self._epoch_starts = [0]
        self._lock = Lock()

        # Each lane reads from a window of its own: with fewer cached windows than lanes, every
        # lookup would shuffle a window anew.
        self._order = lru_cache(_CACHED_EPOCHS * len(self._sizes))(self._compute_order)
        num_windows = max(_CACHED_WINDOWS, 2 * self.num_lanes)
        self._window = lru_cache(num_windows)(self._compute_window)

    def num_sequences(self, source: int) -> int:
        """Return the number of sequences in one epoch of a source."""
        return self._sizes[source]

    def num_steps_in_epochs(self, epochs: int) -> int:
        """Return the steps of the run's first `epochs` epochs; the last of each may be partial."""
        if self._endless:
            return -(-sum(self._sizes) * epochs // self.batch.global_batch)

        with self._lock:
            while len(self._epoch_starts) <= epochs:
                num_draws = self.mixture.num_draws(len(self._epoch_starts) - 1)
                num_steps = -(-num_draws // self.batch.global_batch)
                self._epoch_starts.append(self._epoch_starts[-1] + num_steps)
        return self._epoch_starts[epochs]

    def total_steps(self, schedule: ScheduleSection) -> int:
        """Return the steps of the run: schedule.steps, or those of schedule.epochs."""
        if schedule.steps is not None:
            return schedule.steps
        return self.num_steps_in_epochs(schedule.epochs or 1)

    def epoch_and_step(self, step: int) -> EpochStep:
        """Return the epoch of the run that holds a step, and the step within it.

        With weights there are no such epochs: all steps belong to `ENDLESS`.
        """
        if step < 0:
            raise ValueError(f"step={step}: steps count from 0")
        if self._endless:
            return EpochStep(ENDLESS, step)

        # Read without the lock: the list only grows and its values never change.
        while self._epoch_starts[-1] <= step:
            self.num_steps_in_epochs(len(self._epoch_starts))

        # the last epoch that starts here: one without a step (a small `repeat`) is skipped
        epoch = bisect_right(self._epoch_starts, step) - 1
        return EpochStep(epoch, step - self._epoch_starts[epoch])

    def sequence_refs(self, step: int, lane: int) -> list[SequenceRef]:
        """Return the sequences of a lane at a step.

        Their number is micro_batch, or fewer in the last step of an epoch of the run.
        """
        epoch, within = self.epoch_and_step(step)
        first = within * self.batch.global_batch
        stop = first + self.batch.global_batch
        if not self._endless:
            # the last step of an epoch may be partial: steps do not span epochs
            stop = min(stop, self.mixture.num_draws(epoch))

        refs = []
        for number in range(first + lane, stop, self.num_lanes):
            source, turn = self.mixture.draw(epoch, number)
            refs.append(self.sequence_ref(source, turn))
        return refs

    def epochs_done(self, step: int) -> list[float]:
        """Return about how many of its epochs each source has completed before a step."""
        epoch, within = self.epoch_and_step(step)
        if self._endless:
            num_draws = step * self.batch.global_batch
            drawn: Sequence[float] = self.mixture.approx_draws_by_source(num_draws)
        else:
            num_steps = self.num_steps_in_epochs(epoch + 1) - self.num_steps_in_epochs(epoch)
            drawn = self.mixture.draws_before_epoch(epoch + within / num_steps)
        return [count / size for count, size in zip(drawn, self._sizes, strict=True)]

    def min_draws_by_source(self, steps: int) -> list[int]:
        """Return, per source, a number n whose draws 0 .. n - 1 are all in the first `steps`."""
        if self._endless:
            return self.mixture.min_draws_by_source(steps * self.batch.global_batch)
        return self.mixture.draws_before_epoch(self.epoch_and_step(steps).epoch)

    def blocks_after(self, ref: SequenceRef, count: int) -> list[int]:
        """Return the blocks from `ref`'s to the end of its window, and the `count` after it."""
        order = self._order(ref.source, ref.epoch)
        first_block = self._first_block[ref.source]

        # All blocks of a window are needed from its first step on, as its sequences are shuffled.
        place = int(np.flatnonzero(order.blocks == ref.block - first_block)[0])
        window = int(np.searchsorted(order.window_ends, order.ends[place], side="left"))
        last = int(np.searchsorted(order.ends, order.window_ends[window], side="left"))
        return [first_block + int(number) for number in order.blocks[place : last + 1 + count]]

    def sequence_ref(self, source: int, turn: int) -> SequenceRef:
        """Return the sequence of a source's draw number `turn`, counted over all its epochs."""
        epoch, number = divmod(turn, self._sizes[source])
        position = number
        if self.data.shuffle:
            position = self._stretch_position(number, self._sizes[source])

        # Shuffle within the window. An end is the first position of what follows, hence "right".
        order = self._order(source, epoch)
        window = int(np.searchsorted(order.window_ends, position, side="right"))
        window_start = _start_of(order.window_ends, window)
        permutation = self._window(source, epoch, window)
        position = int(permutation[position - window_start]) + window_start

        # find the block that holds the position; blocks without sequences are stepped over
        place = int(np.searchsorted(order.ends, position, side="right"))
        block_start = _start_of(order.ends, place)

        return SequenceRef(
            source=source,
            epoch=epoch,
            block=self._first_block[source] + int(order.blocks[place]),
            sequence=position - block_start,
        )

    def _stretch_position(self, number: int, size: int) -> int:
        """Return the position of draw `number` of an epoch: each lane walks a stretch of its own.

        A bijection of range(size).
        """
        row, lane = divmod(number, self.num_lanes)
        if self._shuffle_unit > 1:
            # stretches of whole micro-batches; all lanes walk through the rest
            unit = self._shuffle_unit
            stretch = size // (self.num_lanes * unit) * unit
            if number >= stretch * self.num_lanes:
                return number
            return lane * stretch + row

        # the first `num_longer` lanes have one position more
        stretch, num_longer = divmod(size, self.num_lanes)
        return lane * stretch + min(lane, num_longer) + row

    def _compute_order(self, source: int, epoch: int) -> _BlockOrder:
        """Return the order of a source's blocks in an epoch."""
        counts = self._counts[source]
        seed = derive_seed(self.seed, source)
        blocks = epoch_order(len(counts), seed, epoch, self.data.shuffle)
        ends = np.cumsum(counts[blocks])

        # Every lane is in a window of its own, so the lanes together shuffle over about
        # `shuffle_blocks` blocks and a worker need not hold that many for each lane.
        blocks_per_window = 1
        if self.data.shuffle:
            blocks_per_window = max(1, self.data.shuffle_blocks // self.num_lanes)

        # the last window may have fewer blocks
        window_ends = np.append(ends[blocks_per_window - 1 : -1 : blocks_per_window], ends[-1])
        return _BlockOrder(blocks, ends, window_ends)

    def _compute_window(self, source: int, epoch: int, window: int) -> np.ndarray:
        """Return the order of the n sequences of a window: a permutation of range(n)."""
        window_ends = self._order(source, epoch).window_ends
        start = _start_of(window_ends, window)
        count = int(window_ends[window] - start)
        if not self.data.shuffle:
            return np.arange(count)

        seed = derive_seed(self.seed, source, epoch, window)
        unit = self._shuffle_unit
        if unit == 1:
            return np.argsort(random_uint64(seed, count), kind="stable")

        # Shuffle whole micro-batches. Lanes take them from positions that `unit` divides, so what
        # is before the first and after the last such position keeps its place.
        first = min(-start % unit, count)
        num_units = (count - first) // unit
        order = np.argsort(random_uint64(seed, num_units), kind="stable")

        unit_starts = first + order[:, None] * unit  # (num_units, 1)
        shuffled = (unit_starts + np.arange(unit)).reshape(-1)
        rest = np.arange(first + num_units * unit, count)
        return np.concatenate([np.arange(first), shuffled, rest])


def _start_of(ends: np.ndarray, number: int) -> int:
    """Return where part `number` starts: at the end of the one before it."""
    if number == 0:
        return 0
    return int(ends[number - 1])
