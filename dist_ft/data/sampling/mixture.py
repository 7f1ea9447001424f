"""Mixing: which source each sequence of a run comes from.

Draws are numbered; lanes take them in turn. In rounds of about `ROUND` draws a lane gets each source as often as the
shares up to there ask for, every lane equally often, its turns spread evenly: so shares are kept exactly and not only
on average, and what was drawn before any draw follows by arithmetic. Without weights the shares are what the sources
hold (times `repeat`): an epoch of the run is finite and ends, after the last whole round, with exactly what is left of
each source. With weights draws go on for ever (epoch `ENDLESS`), each source going round its own epochs. Pure, and the
same for every world.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from threading import Lock

import numpy as np

from dist_ft.config.schema import DataSection
from dist_ft.data.sampling.shuffle import hashes, mix

ROUND = 64
ENDLESS = -1
Draw = tuple[int, int]
"""(source, number of the draw among all draws from that source)."""


def weights_at_start(data: DataSection, sizes: Sequence[int]) -> np.ndarray:
    """Return the shares (S,) of sources that hold `sizes` sequences, summing to 1: by weight, temperature or repeat."""
    counts = np.array(sizes, dtype=np.float64)
    if data.temperature is not None:
        weights = counts ** (1 / data.temperature)
    elif any(source.weight is not None for source in data.train):
        weights = np.array([source.weight or 0.0 for source in data.train])
    else:
        weights = counts * np.array(repeats(data, sizes))
    return weights / weights.sum()


def repeats(data: DataSection, sizes: Sequence[int]) -> list[float]:
    """Return the times each source counts in an epoch: its repeat, or what gives it its share of the sequences."""
    plain = [source.repeat or 1.0 for source in data.train]
    shares = [source.share or 0.0 for source in data.train]
    own = sum(
        times * size for times, size, share in zip(plain, sizes, shares, strict=True) if not share
    )
    return [
        share / (1 - sum(shares)) * own / size if share and size else times
        for times, size, share in zip(plain, sizes, shares, strict=True)
    ]


def is_weighted(data: DataSection) -> bool:
    """Tell whether shares are given, and not those of the sources' sizes: then draws are endless."""
    if len(data.train) == 1:
        return False
    return (
        data.temperature is not None
        or bool(data.mixing)
        or any(s.weight is not None for s in data.train)
    )


class Mixture:
    """The draws of a run."""

    def __init__(
        self, data: DataSection, sizes: Sequence[int], num_lanes: int, micro_batch: int, seed: int
    ) -> None:
        """Take the sequences each source holds; nothing is computed yet."""
        self._data = data
        self._sizes = tuple(sizes)
        self._lanes = num_lanes
        self._micro_batch = micro_batch
        self._seed = seed
        self._repeats = (
            [1.0] * len(self._sizes) if is_weighted(data) else repeats(data, self._sizes)
        )
        self._shares = [
            np.zeros(len(sizes))
        ]  # of endless draws: what a lane is due before each round
        self._lock = (
            Lock()
        )  # of `_shares`: the loader's thread draws while the trainer asks how far it is
        self._due = lru_cache(256)(self._make_due)
        self._turns = lru_cache(1024)(self._make_turns)
        self._tail = lru_cache(2)(self._make_tail)

    def base(self, epoch: float) -> list[int]:
        """Return how often each source is drawn before an epoch of the run: its size, times repeat, times epochs."""
        return [
            int(epoch * repeat * size)
            for repeat, size in zip(self._repeats, self._sizes, strict=True)
        ]

    def size(self, epoch: int) -> int:
        """Return the draws of an epoch of the run; with weights, as many as all sources hold."""
        return sum(self.base(epoch + 1)) - sum(self.base(epoch))

    def drawn_by_all(self, draws: int) -> list[int]:
        """Return, for each source, a number before which all its draws are among the first `draws` endless ones."""
        least = [
            self._before(lane, -(-(draws - lane) // self._lanes)) for lane in range(self._lanes)
        ]
        return [int(turns) * self._lanes for turns in np.min(least, axis=0)]

    def drawn_about(self, draws: int) -> list[int]:
        """Return how often each source has come about in the first `draws` endless ones: lanes differ by a round's."""
        return [int(turns) * self._lanes for turns in self._before(0, draws // self._lanes)]

    def draw(self, epoch: int, number: int) -> Draw:
        """Return which source draw `number` of an epoch of the run (or of `ENDLESS`) takes, and which of its draws."""
        if epoch == ENDLESS:
            return self._of_lane(ENDLESS, *divmod(number, self._lanes))
        base = self.base(epoch)
        if len(base) == 1:
            return 0, base[0] + number
        row, lane = divmod(number, self._lanes)
        body = self._due(epoch, self._num_rounds(epoch))
        if row < body.sum():
            source, turn = self._of_lane(epoch, row, lane)
        else:
            source, turn = self._tail(epoch)[(row - int(body.sum())) * self._lanes + lane].tolist()
        return source, base[source] + turn

    def weights(self, step: float) -> np.ndarray:
        """Return the shares (S,) at a step, summing to 1."""
        start = weights_at_start(self._data, self._sizes)
        if not self._data.mixing:
            return start
        steps = [0, *(phase.until_step for phase in self._data.mixing)]
        rows = np.array([start, *(np.array(p.weights) / sum(p.weights) for p in self._data.mixing)])
        return np.array([np.interp(step, steps, rows[:, i]) for i in range(rows.shape[1])])

    def _num_rounds(self, epoch: int) -> int:
        """Return the whole rounds of an epoch."""
        return self.size(epoch) // (ROUND * self._lanes)

    def _make_due(self, epoch: int, round_number: int) -> np.ndarray:
        """Return how often a lane has drawn each source, int64 (S,), before a round: its shares, rounded down.

        Counted from the start of an epoch of the run, or of all endless draws.
        """
        if epoch != ENDLESS:
            sizes = np.subtract(self.base(epoch + 1), self.base(epoch)).astype(np.int64)
            return sizes * (round_number * ROUND) // max(1, int(sizes.sum()))
        with self._lock:
            while len(self._shares) <= round_number:
                step = (len(self._shares) - 0.5) * ROUND / self._micro_batch
                self._shares.append(self._shares[-1] + self.weights(step) * ROUND)
        return np.floor(self._shares[round_number] + 1e-6).astype(np.int64)

    def _of_lane(self, epoch: int, row: int, lane: int) -> Draw:
        """Return the draw number `row` of a lane."""
        round_number = row // ROUND
        while int(self._due(epoch, round_number + 1).sum()) <= row:
            round_number += 1
        turns = self._turns(epoch, round_number, lane)
        within = row - int(self._due(epoch, round_number).sum())
        source = int(turns[within])
        before = self._due(epoch, round_number)[source] + np.count_nonzero(turns[:within] == source)
        return source, int(before) * self._lanes + lane

    def _before(self, lane: int, rows: int) -> np.ndarray:
        """Return how often a lane draws each source, int64 (S,), in its first `rows` endless draws."""
        round_number = rows // ROUND
        while int(self._due(ENDLESS, round_number + 1).sum()) <= rows:
            round_number += 1
        due = self._due(ENDLESS, round_number)
        turns = self._turns(ENDLESS, round_number, lane)[: rows - int(due.sum())]
        return due + np.bincount(turns, minlength=len(due))

    def _make_turns(self, epoch: int, round_number: int, lane: int) -> np.ndarray:
        """Return the source of each draw of a lane in a round."""
        quota = self._due(epoch, round_number + 1) - self._due(epoch, round_number)
        return spread(quota, mix(self._seed, epoch + 1, round_number, lane))[:, 0]

    def _make_tail(self, epoch: int) -> np.ndarray:
        """Return (source, turn) of the draws after the whole rounds of an epoch."""
        done = self._due(epoch, self._num_rounds(epoch)) * self._lanes
        left = np.subtract(self.base(epoch + 1), self.base(epoch)) - done
        found = spread(left, mix(self._seed, epoch + 1))
        found[:, 1] += done[found[:, 0]]
        return found


def spread(counts: np.ndarray, seed: int) -> np.ndarray:
    """Return (sum, 2) int64 [source, turn]: each source `counts` times, evenly spread, by seed."""
    source = np.repeat(np.arange(len(counts)), counts)
    turn = np.arange(len(source)) - np.repeat(np.cumsum(counts) - counts, counts)
    jitter = hashes(seed, len(source)) / 2.0**64
    order = np.argsort((turn + jitter) / counts[source], kind="stable")
    return np.column_stack([source[order], turn[order]]).astype(np.int64)
