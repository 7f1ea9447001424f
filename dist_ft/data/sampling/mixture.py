"""Mixing: which source each sequence of a run comes from.

Draws are numbered, and the lanes take them in turn: draw `d` belongs to lane `d % num_lanes`. In
rounds of about `ROUND` draws, each lane draws each source as often as its share up to that round
requires, in turns that are spread evenly. So shares are exact and not only exact on average, and
the number of draws before any draw follows by arithmetic.

Without weights, the shares are the sizes of the sources (times `repeat`). An epoch of the run is
then finite and ends, after its last whole round, with a tail of exactly what is left of each
source. With weights, draws never end (epoch `ENDLESS`) and each source cycles through its own
epochs. Pure, and the same for every world size.

S is the number of sources.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from threading import Lock
from typing import NamedTuple

import numpy as np

from dist_ft.config.schema import DataSection
from dist_ft.core.seeds import derive_seed, random_uint64

ROUND = 64
"""Draws of a lane in one round."""
ENDLESS = -1
"""The epoch of draws that never end (with weights)."""


class Draw(NamedTuple):
    """One draw of the run.

    Attributes:
        source: number of the source.
        turn: number of the draw among all draws from that source, from 0.
    """

    source: int
    turn: int


def initial_shares(data: DataSection, sizes: Sequence[int]) -> np.ndarray:
    """Return the shares of the sources at step 0, float64 (S,), which sum to 1.

    Args:
        data: gives weights, a temperature or repeats.
        sizes: number of sequences of each source.
    """
    counts = np.array(sizes, dtype=np.float64)

    # a temperature above 1 draws small sources more often than their size
    if data.temperature is not None:
        weights = counts ** (1 / data.temperature)
    elif any(source.weight is not None for source in data.train):
        weights = np.array([source.weight or 0.0 for source in data.train])
    else:
        weights = counts * np.array(source_repeats(data, sizes))

    return weights / weights.sum()


def source_repeats(data: DataSection, sizes: Sequence[int]) -> list[float]:
    """Return how many times each source counts in an epoch, S values.

    That is its `repeat`, or the number that gives it its `share` of the epoch's sequences.
    """
    repeats = [source.repeat or 1.0 for source in data.train]
    shares = [source.share or 0.0 for source in data.train]

    # sequences of the sources without a share; these make up 1 - sum(shares) of the epoch
    unshared = []
    for repeat, size, share in zip(repeats, sizes, shares, strict=True):
        if not share:
            unshared.append(repeat * size)
    num_unshared = sum(unshared)

    for number, (size, share) in enumerate(zip(sizes, shares, strict=True)):
        if share and size:
            repeats[number] = share / (1 - sum(shares)) * num_unshared / size

    return repeats


def is_weighted(data: DataSection) -> bool:
    """Whether shares are configured rather than given by the sources' sizes.

    Draws are then endless.
    """
    # One source has nothing to mix: its epochs stay finite whatever weight it has.
    if len(data.train) == 1:
        return False

    has_weights = any(source.weight is not None for source in data.train)
    return data.temperature is not None or bool(data.mixing) or has_weights


class Mixture:
    """The draws of a run."""

    def __init__(
        self, data: DataSection, sizes: Sequence[int], num_lanes: int, micro_batch: int, seed: int
    ) -> None:
        """Store the settings; compute nothing yet.

        Args:
            data: weights, temperature, repeats and phases of the mixture.
            sizes: number of sequences of each source.
            num_lanes: micro-batches of a global batch.
            micro_batch: sequences of a micro-batch.
            seed: seed of the mixture.
        """
        self._data = data
        self._sizes = tuple(sizes)
        self._num_lanes = num_lanes
        self._micro_batch = micro_batch
        self._seed = seed

        if is_weighted(data):
            # Endless draws have no epochs to repeat a source in: repeats only enter the shares.
            self._repeats = [1.0] * len(self._sizes)
        else:
            self._repeats = source_repeats(data, self._sizes)

        # Endless draws: draws of a lane from each source that are due before each round. Locked,
        # as the loader's thread draws while the trainer reads its progress.
        self._due_before_round = [np.zeros(len(sizes))]
        self._lock = Lock()

        # Caches of this instance: a decorator on the methods would share one cache over all
        # mixtures of the process and keep each of them alive.
        self._due = lru_cache(256)(self._compute_due)
        self._turns = lru_cache(1024)(self._compute_turns)
        self._tail = lru_cache(2)(self._compute_tail)

    def draws_before_epoch(self, epoch: float) -> list[int]:
        """Return the number of draws from each source before an epoch of the run (or a part of it).

        That is size × repeat × epoch, rounded down.
        """
        # Rounding the total down, not each epoch: a repeat of 0.5 of 3 sequences gives 1 and 2
        # draws in turn, and exactly 3 over two epochs.
        return [
            int(epoch * repeat * size)
            for repeat, size in zip(self._repeats, self._sizes, strict=True)
        ]

    def num_draws(self, epoch: int) -> int:
        """Return the number of draws in an epoch of the run.

        With weights: the number of sequences of all sources.
        """
        return sum(self.draws_before_epoch(epoch + 1)) - sum(self.draws_before_epoch(epoch))

    def min_draws_by_source(self, num_draws: int) -> list[int]:
        """Return, per source, a number n whose draws 0 .. n - 1 are among the first endless draws.

        Lanes differ, so later draws of the source may be among the first `num_draws` as well.
        """
        by_lane = []
        for lane in range(self._num_lanes):
            # draws d < num_draws with d % num_lanes == lane
            num_rows = -(-(num_draws - lane) // self._num_lanes)
            by_lane.append(self._lane_draws_by_source(lane, num_rows))

        # Lane l takes the turns l, l + num_lanes, ... of a source. The slowest lane limits how many
        # turns are drawn without a gap.
        return [int(turns) * self._num_lanes for turns in np.min(by_lane, axis=0)]

    def approx_draws_by_source(self, num_draws: int) -> list[int]:
        """Return about how often each source occurs in the first `num_draws` endless draws.

        Exact within a round, by which lanes may differ.
        """
        turns_of_lane = self._lane_draws_by_source(0, num_draws // self._num_lanes)
        return [int(turns) * self._num_lanes for turns in turns_of_lane]

    def draw(self, epoch: int, number: int) -> Draw:
        """Return draw `number` of an epoch of the run (or of `ENDLESS`)."""
        row, lane = divmod(number, self._num_lanes)
        if epoch == ENDLESS:
            return self._lane_draw(ENDLESS, row, lane)

        before = self.draws_before_epoch(epoch)
        if len(before) == 1:
            return Draw(0, before[0] + number)

        num_rows_in_rounds = self._due(epoch, self._num_rounds(epoch)).sum()
        if row < num_rows_in_rounds:
            source, turn = self._lane_draw(epoch, row, lane)
        else:
            # What is left of an epoch cannot be the same for all lanes, so the tail is one list
            # that they take in turn.
            tail_row = row - int(num_rows_in_rounds)
            source, turn = self._tail(epoch)[tail_row * self._num_lanes + lane].tolist()

        return Draw(source, before[source] + turn)

    def shares_at(self, step: float) -> np.ndarray:
        """Return the shares of the sources at a step, float64 (S,), which sum to 1."""
        start = initial_shares(self._data, self._sizes)
        if not self._data.mixing:
            return start

        steps = [0]
        shares = [start]
        for phase in self._data.mixing:
            steps.append(phase.until_step)
            shares.append(np.array(phase.weights) / sum(phase.weights))

        # linear between phases; after the last, its shares stay
        by_source = np.array(shares).T  # (S, phases + 1)
        return np.array([np.interp(step, steps, own_shares) for own_shares in by_source])

    def _num_rounds(self, epoch: int) -> int:
        """Return the number of whole rounds of an epoch."""
        return self.num_draws(epoch) // (ROUND * self._num_lanes)

    def _compute_due(self, epoch: int, round_number: int) -> np.ndarray:
        """Return the draws of a lane from each source before a round, int64 (S,), rounded down.

        Counted from the start of the epoch of the run, or of all endless draws.
        """
        if epoch != ENDLESS:
            before = self.draws_before_epoch(epoch)
            after = self.draws_before_epoch(epoch + 1)
            sizes = np.subtract(after, before).astype(np.int64)

            # integers: an epoch must hold each sequence exactly once, whatever its length
            return sizes * (round_number * ROUND) // max(1, int(sizes.sum()))

        with self._lock:
            while len(self._due_before_round) <= round_number:
                # Shares change linearly, so those in the middle of a round are its average.
                middle_step = (len(self._due_before_round) - 0.5) * ROUND / self._micro_batch
                due_in_round = self.shares_at(middle_step) * ROUND
                self._due_before_round.append(self._due_before_round[-1] + due_in_round)

        # A sum of floats may lie just below the integer that it stands for.
        return np.floor(self._due_before_round[round_number] + 1e-6).astype(np.int64)

    def _find_round(self, epoch: int, row: int) -> int:
        """Return the round that holds draw `row` of a lane."""
        round_number = row // ROUND  # or a later one: rounding down may shorten rounds
        while int(self._due(epoch, round_number + 1).sum()) <= row:
            round_number += 1
        return round_number

    def _lane_draw(self, epoch: int, row: int, lane: int) -> Draw:
        """Return draw number `row` of a lane; its turn counts from the start of the epoch."""
        round_number = self._find_round(epoch, row)
        due = self._due(epoch, round_number)
        sources = self._turns(epoch, round_number, lane)
        within = row - int(due.sum())

        # The lane's k-th draw of a source is turn k * num_lanes + lane: lanes walk through a source
        # side by side, and each reads few blocks at a time.
        source = int(sources[within])
        own_turn = due[source] + np.count_nonzero(sources[:within] == source)
        return Draw(source, int(own_turn) * self._num_lanes + lane)

    def _lane_draws_by_source(self, lane: int, num_rows: int) -> np.ndarray:
        """Return how often a lane draws each source in its first endless draws, int64 (S,)."""
        round_number = self._find_round(ENDLESS, num_rows)
        due = self._due(ENDLESS, round_number)
        sources = self._turns(ENDLESS, round_number, lane)[: num_rows - int(due.sum())]
        return due + np.bincount(sources, minlength=len(due))

    def _compute_turns(self, epoch: int, round_number: int, lane: int) -> np.ndarray:
        """Return the source of each draw of a lane in a round, int64 (about ROUND,)."""
        quota = self._due(epoch, round_number + 1) - self._due(epoch, round_number)
        seed = derive_seed(self._seed, epoch + 1, round_number, lane)
        return spread_evenly(quota, seed)[:, 0]

    def _compute_tail(self, epoch: int) -> np.ndarray:
        """Return the draws after the whole rounds of an epoch, int64 (n, 2) [source, turn]."""
        in_rounds = self._due(epoch, self._num_rounds(epoch)) * self._num_lanes  # (S,)
        before = self.draws_before_epoch(epoch)
        after = self.draws_before_epoch(epoch + 1)
        num_left = np.subtract(after, before) - in_rounds

        draws = spread_evenly(num_left, derive_seed(self._seed, epoch + 1))
        # turns of the tail follow those of the rounds
        draws[:, 1] += in_rounds[draws[:, 0]]
        return draws


def spread_evenly(counts: np.ndarray, seed: int) -> np.ndarray:
    """Return an even spread of `counts` draws of each source, in an order by seed.

    Args:
        counts: (S,) number of draws of each source.
        seed: seed of the jitter within each source's even spacing.

    Returns:
        int64 (sum, 2) [source, turn], where turn counts the source's draws from 0.
    """
    source = np.repeat(np.arange(len(counts)), counts)  # (sum,)
    first_of_source = np.cumsum(counts) - counts
    turn = np.arange(len(source)) - np.repeat(first_of_source, counts)

    # turn k of n draws lies at a random point of [k / n, (k + 1) / n)
    jitter = random_uint64(seed, len(source)) / 2.0**64
    order = np.argsort((turn + jitter) / counts[source], kind="stable")
    return np.column_stack([source[order], turn[order]]).astype(np.int64)
