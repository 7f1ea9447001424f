"""The plan: which sequence of which block stands where in every step of a run.

A pure function of the index's counts, config, step and lane; what it costs grows with the number of blocks, not of
samples or ranks. Sequences of a source have positions in an epoch: blocks in an order by seed and epoch, window after
window of blocks, the sequences of a window shuffled. With shuffling a lane walks through a stretch of positions of its
own, so that it reads few blocks at a time; without, every step takes the next positions. With `data.bucket`, sequences
that lie together in a block are of like length, and whole micro-batches of them are shuffled. Guarantees: each position
once an epoch of its source; nothing depends on how many workers there are. Does not know tokens or lengths.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from threading import Lock

import numpy as np

from dist_ft.config.schema import BatchSection, DataSection, ScheduleSection
from dist_ft.data.sampling.mixture import ENDLESS, Mixture, is_weighted
from dist_ft.data.sampling.shuffle import epoch_order, hashes, mix

_KEPT_EPOCHS = 8
_KEPT_WINDOWS = 64


@dataclass(frozen=True)
class Slot:
    """Where the sequence of one place in the global batch comes from.

    Attributes:
        source: number of the source.
        epoch: of that source, from 0.
        block: number of the block in the index.
        sequence: number of the sequence within the packed block.
    """

    source: int
    epoch: int
    block: int
    sequence: int


class Plan:
    """The steps of a run, counted from 0."""

    def __init__(
        self,
        counts: np.ndarray,
        sources: np.ndarray,
        data: DataSection,
        batch: BatchSection,
        seed: int,
    ) -> None:
        """Take the sequences (N,) and the source (N,) of every block; nothing is computed yet.

        `sources` ascends: the blocks of a source lie together.
        """
        self.data = data
        self.batch = batch
        self.seed = seed
        self.num_lanes = batch.global_batch // batch.micro_batch
        self._together = batch.micro_batch if data.bucket and not data.pack else 1
        edges = np.searchsorted(sources, np.arange(len(data.train) + 1))
        self._first = edges[:-1].tolist()
        self._counts = [counts[start:stop].astype(np.int64) for start, stop in pairwise(edges)]
        self._sizes = [int(found.sum()) for found in self._counts]
        self.mixture = Mixture(
            data, self._sizes, self.num_lanes, batch.micro_batch, mix(seed, len(self._sizes))
        )
        self._endless = is_weighted(data)
        self._ends = [0]  # the first step after epochs of the run, one after the other
        self._lock = (
            Lock()
        )  # of `_ends`: the loader's thread locates steps while the trainer asks how far it is
        self._order = lru_cache(_KEPT_EPOCHS * len(self._sizes))(self._make_order)
        self._window = lru_cache(max(_KEPT_WINDOWS, 2 * self.num_lanes))(self._make_window)

    def num_sequences(self, source: int) -> int:
        """Return the sequences of one epoch of a source."""
        return self._sizes[source]

    def steps_of(self, epochs: int) -> int:
        """Return the steps of so many epochs of the run; the last of each may be partial."""
        if self._endless:
            return -(-sum(self._sizes) * epochs // self.batch.global_batch)
        with self._lock:
            while len(self._ends) <= epochs:
                size = self.mixture.size(len(self._ends) - 1)
                self._ends.append(self._ends[-1] + -(-size // self.batch.global_batch))
        return self._ends[epochs]

    def total_steps(self, schedule: ScheduleSection) -> int:
        """Return the steps of the run: schedule.steps, or as many as schedule.epochs have."""
        return schedule.steps if schedule.steps is not None else self.steps_of(schedule.epochs or 1)

    def locate(self, step: int) -> tuple[int, int]:
        """Return (epoch of the run, step within it); with weights there are no such epochs (`ENDLESS`)."""
        if step < 0:
            raise ValueError(f"step={step}: steps count from 0")
        if self._endless:
            return ENDLESS, step
        while self._ends[-1] <= step:
            self.steps_of(len(self._ends))
        epoch = bisect_right(self._ends, step) - 1
        return epoch, step - self._ends[epoch]

    def slots(self, step: int, lane: int) -> list[Slot]:
        """Return the slots of a lane at a step: micro_batch, or fewer in the last step of an epoch of the run."""
        epoch, within = self.locate(step)
        first = within * self.batch.global_batch
        draws = range(first + lane, first + self.batch.global_batch, self.num_lanes)
        stop = None if self._endless else self.mixture.size(epoch)
        return [
            self._slot(*self.mixture.draw(epoch, number))
            for number in draws
            if stop is None or number < stop
        ]

    def epochs_of(self, step: int) -> list[float]:
        """Return how many of its epochs each source has about gone through before a step."""
        epoch, within = self.locate(step)
        if self._endless:
            drawn: Sequence[float] = self.mixture.drawn_about(step * self.batch.global_batch)
        else:
            drawn = self.mixture.base(
                epoch + within / (self.steps_of(epoch + 1) - self.steps_of(epoch))
            )
        return [count / size for count, size in zip(drawn, self._sizes, strict=True)]

    def drawn_by_all(self, steps: int) -> list[int]:
        """Return, for each source, a number before which all its draws are made within so many steps."""
        if self._endless:
            return self.mixture.drawn_by_all(steps * self.batch.global_batch)
        return self.mixture.base(self.locate(steps)[0])

    def blocks_after(self, slot: Slot, count: int) -> list[int]:
        """Return the blocks that follow a slot's in the order of its epoch, and those of its window."""
        order, ends, window_ends = self._order(slot.source, slot.epoch)
        at = int(np.flatnonzero(order == slot.block - self._first[slot.source])[0])
        window = int(np.searchsorted(window_ends, ends[at], side="left"))
        last = int(np.searchsorted(ends, window_ends[window], side="left"))
        return [self._first[slot.source] + int(number) for number in order[at : last + 1 + count]]

    def _slot(self, source: int, draw: int) -> Slot:
        """Return the slot of a source's draw number `draw`, counted over all epochs."""
        epoch, number = divmod(draw, self._sizes[source])
        position = number if not self.data.shuffle else self._stretched(number, self._sizes[source])
        order, ends, window_ends = self._order(source, epoch)
        window = int(np.searchsorted(window_ends, position, side="right"))
        begun = int(window_ends[window - 1]) if window else 0
        permuted = self._window(source, epoch, window)
        within = int(permuted[position - begun]) + begun
        at = int(np.searchsorted(ends, within, side="right"))
        return Slot(
            source,
            epoch,
            self._first[source] + int(order[at]),
            within - (int(ends[at - 1]) if at else 0),
        )

    def _stretched(self, number: int, size: int) -> int:
        """Return the position of an epoch's draw: lane after lane has a stretch of its own (a bijection)."""
        row, column = divmod(number, self.num_lanes)
        if (
            self._together > 1
        ):  # stretches of whole micro-batches; what is left is walked by all lanes
            share = size // (self.num_lanes * self._together) * self._together
            return column * share + row if number < share * self.num_lanes else number
        return column * (size // self.num_lanes) + min(column, size % self.num_lanes) + row

    def _make_order(self, source: int, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the blocks of a source in an epoch's order, the position after each, and that after each window."""
        counts = self._counts[source]
        order = epoch_order(len(counts), mix(self.seed, source), epoch, self.data.shuffle)
        ends = np.cumsum(counts[order])
        width = max(1, self.data.shuffle_blocks // self.num_lanes) if self.data.shuffle else 1
        return order, ends, np.append(ends[width - 1 : -1 : width], ends[-1])

    def _make_window(self, source: int, epoch: int, window: int) -> np.ndarray:
        """Return the order of the sequences in a window."""
        _, _, ends = self._order(source, epoch)
        count = int(ends[window] - (ends[window - 1] if window else 0))
        if not self.data.shuffle:
            return np.arange(count)
        seed, size = mix(self.seed, source, epoch, window), self._together
        if size == 1:
            return np.argsort(hashes(seed, count), kind="stable")
        begun = int(ends[window - 1]) if window else 0
        first = min(
            -begun % size, count
        )  # lanes take micro-batches from positions that `size` divides
        groups = (count - first) // size
        order = np.argsort(hashes(seed, groups), kind="stable")
        whole = (first + order[:, None] * size + np.arange(size)).reshape(-1)
        return np.concatenate([np.arange(first), whole, np.arange(first + groups * size, count)])
