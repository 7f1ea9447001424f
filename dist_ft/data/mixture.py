"""Mixing: which source each sequence of a run comes from.

Pure, and the same for every world. Each lane draws its own series of sequences in rounds of `ROUND`; a round holds
each source as often as its weights up to there ask for, so that shares are kept exactly and not only on average, and
within a round a source's turns are spread evenly. The k-th draw of lane l from a source is that source's draw number
k * lanes + l: what has been drawn follows from step and lane by arithmetic, and each source goes round its own epochs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dist_ft.config.schema import DataSection
from dist_ft.data.order import hashes, mix

ROUND = 256
_AHEAD = 64  # rounds whose quotas are computed at once


def base_weights(data: DataSection, sizes: Sequence[int]) -> np.ndarray:
    """Return the shares (S,) of sources that hold `sizes` sequences, summing to 1: by weight, temperature or repeat."""
    counts = np.array(sizes, dtype=np.float64)
    if data.temperature is not None:
        weights = counts ** (1 / data.temperature)
    elif any(source.weight is not None for source in data.train):
        weights = np.array([source.weight or 0.0 for source in data.train])
    else:
        weights = counts * np.array([source.repeat or 1.0 for source in data.train])
    return weights / weights.sum()


def sequences_in_epoch(data: DataSection, sizes: Sequence[int]) -> int:
    """Return the sequences an epoch of the run draws: all sources' sizes, each times its `repeat`."""
    return max(1, round(sum(size * (source.repeat or 1.0) for size, source in zip(sizes, data.train, strict=True))))


class Mixture:
    """The draws of every lane."""

    def __init__(self, data: DataSection, sizes: Sequence[int], micro_batch: int, seed: int) -> None:
        """Take the sequences each source holds; quotas are computed when first asked for."""
        self._sizes = tuple(sizes)
        self._micro_batch = micro_batch
        self._seed = seed
        self._phases = data.mixing
        self._base = base_weights(data, sizes)
        self._totals = [np.zeros(len(sizes), dtype=np.int64)]  # draws a source before each round
        self._ideal = np.zeros(len(sizes))

    @property
    def is_single(self) -> bool:
        """Whether there is one source only."""
        return len(self._sizes) == 1

    def weights(self, step: int) -> np.ndarray:
        """Return the shares (S,) at a step, summing to 1."""
        if not self._phases:
            return self._base
        steps = [0, *(phase.until_step for phase in self._phases)]
        rows = np.array([self._base, *(np.array(p.weights) / sum(p.weights) for p in self._phases)])
        return np.array([np.interp(step, steps, rows[:, i]) for i in range(rows.shape[1])])

    def totals(self, round_number: int) -> np.ndarray:
        """Return how often a lane has drawn each source, int64 (S,), before a round."""
        while len(self._totals) <= round_number:
            for _ in range(_AHEAD):
                step = (len(self._totals) - 1) * ROUND // self._micro_batch
                self._ideal = self._ideal + self.weights(step) * ROUND
                self._totals.append(self._totals[-1] + quotas(self._ideal - self._totals[-1], ROUND))
        return self._totals[round_number]

    def turns(self, lane: int, round_number: int) -> np.ndarray:
        """Return the source of each draw of a lane in a round, int64 (ROUND,)."""
        quota = self.totals(round_number + 1) - self.totals(round_number)
        source = np.repeat(np.arange(len(quota)), quota)
        turn = np.arange(ROUND) - np.repeat(np.cumsum(quota) - quota, quota)
        jitter = hashes(mix(self._seed, lane, round_number), ROUND) / 2.0**64
        return source[np.argsort((turn + jitter) / quota[source], kind="stable")]

    def before(self, lane: int, number: int) -> np.ndarray:
        """Return how often a lane draws each source, int64 (S,), in its first `number` draws."""
        round_number, within = divmod(number, ROUND)
        turns = self.turns(lane, round_number)[:within]
        return self.totals(round_number) + np.bincount(turns, minlength=len(self._sizes))

    def draws(self, lane: int, first: int, count: int) -> list[tuple[int, int]]:
        """Return (source, k) of the draws first .. first + count - 1 of a lane: its k-th from that source."""
        if self.is_single:
            return [(0, number) for number in range(first, first + count)]
        found: list[tuple[int, int]] = []
        number = first
        while len(found) < count:
            round_number, within = divmod(number, ROUND)
            turns = self.turns(lane, round_number)
            done = self.totals(round_number) + np.bincount(turns[:within], minlength=len(self._sizes))
            for source in turns[within:within + count - len(found)].tolist():
                found.append((source, int(done[source])))
                done[source] += 1
                number += 1
        return found


def quotas(due: np.ndarray, total: int) -> np.ndarray:
    """Return whole numbers int64 (S,) that sum to `total` and follow `due` (S,): floors, then the largest remainders.

    `due` may be below zero where rounding gave a source more before; it then gets nothing now.
    """
    wanted = np.maximum(due, 0.0)
    wanted *= total / wanted.sum()
    given = np.floor(wanted).astype(np.int64)
    missing = total - int(given.sum())
    given[np.argsort(given - wanted, kind="stable")[:missing]] += 1
    return given
