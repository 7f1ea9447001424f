"""The plan: which pieces of which samples make up every step of a run.

A pure function of index, config and step: samples are ordered by seed and epoch, packed window by window over the
global order, and sequence g of an epoch goes to step g // global_batch, slot g % global_batch. Guarantees: every piece
exactly once an epoch; nothing depends on how many workers there are. Does not read tokens.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from dataclasses import dataclass
from itertools import pairwise
from threading import RLock

import numpy as np

from dist_ft.config.schema import BatchSection, DataSection, ScheduleSection
from dist_ft.data.index import Index
from dist_ft.data.order import epoch_order, hashes, mix
from dist_ft.data.packing import pack

_KEPT_EPOCHS = 2  # prefetching crosses the border of epochs


@dataclass(frozen=True)
class EpochPlan:
    """The sequences of one epoch, in order.

    Attributes:
        members: (P,) int64 piece numbers, sequence after sequence.
        offsets: (G + 1,) int64: sequence g is members[offsets[g]:offsets[g + 1]].
    """

    members: np.ndarray
    offsets: np.ndarray

    @property
    def num_sequences(self) -> int:
        """G: sequences of the epoch."""
        return len(self.offsets) - 1


def plan_epoch(lengths: np.ndarray, data: DataSection, sequence_length: int, seed: int, epoch: int) -> EpochPlan:
    """Return the sequences of an epoch over pieces of `lengths` (P,) tokens.

    Each window of `data.packing_window` pieces of the order is packed for itself. With data.shuffle its sequences are
    then shuffled, so that long samples do not come first; without, they follow their first piece.
    """
    order = epoch_order(len(lengths), seed, epoch, data.shuffle)
    if not data.pack or data.packing_window == 1:
        return EpochPlan(order, np.arange(len(order) + 1, dtype=np.int64))
    sequence = np.empty(len(order), dtype=np.int64)
    done = 0
    for window, start in enumerate(range(0, len(order), data.packing_window)):
        part = slice(start, start + data.packing_window)
        assigned = pack(lengths[order[part]], sequence_length)
        count = int(assigned.max()) + 1
        rank = np.empty(count, dtype=np.int64)
        if data.shuffle:
            rank[np.argsort(hashes(mix(seed, epoch, window), count), kind="stable")] = np.arange(count)
        else:
            rank[assigned[np.sort(np.unique(assigned, return_index=True)[1])]] = np.arange(count)
        sequence[part] = done + rank[assigned]
        done += count
    members = order[np.argsort(sequence, kind="stable")]
    return EpochPlan(members, np.concatenate([[0], np.cumsum(np.bincount(sequence, minlength=done))]))


class Plan:
    """The steps of a run. Steps and epochs count from 0; step s of the run is `locate(s)`."""

    def __init__(self, index: Index, data: DataSection, batch: BatchSection, seed: int) -> None:
        """Assign only; an epoch is planned when first asked for."""
        self.index = index
        self.data = data
        self.batch = batch
        self.seed = seed
        self._epochs: OrderedDict[int, EpochPlan] = OrderedDict()
        self._ends: list[int] = []  # of epochs 0.. that were counted: the first step after each
        self._lock = RLock()

    def epoch(self, epoch: int) -> EpochPlan:
        """Return an epoch's sequences; the two used last are kept. Safe over threads."""
        with self._lock:
            if epoch not in self._epochs:
                self._epochs[epoch] = plan_epoch(self.index.pieces[:, 2], self.data, self.batch.sequence_length,
                                                 self.seed, epoch)
                if len(self._epochs) > _KEPT_EPOCHS:
                    self._epochs.popitem(last=False)
            self._epochs.move_to_end(epoch)
            return self._epochs[epoch]

    def steps_in_epoch(self, epoch: int) -> int:
        """Return how many steps an epoch has; the last may be partial."""
        return self._end(epoch) - (self._end(epoch - 1) if epoch else 0)

    def total_steps(self, schedule: ScheduleSection) -> int:
        """Return the steps of the run: schedule.steps, or as many as schedule.epochs have."""
        return schedule.steps if schedule.steps is not None else self._end((schedule.epochs or 1) - 1)

    def locate(self, step: int) -> tuple[int, int]:
        """Return (epoch, step within it) of a step of the run; epochs follow one another without end."""
        if step < 0:
            raise ValueError(f"step={step}: steps count from 0")
        while not self._ends or step >= self._ends[-1]:
            self._end(len(self._ends))
        epoch = bisect_right(self._ends, step)
        return epoch, step - (self._ends[epoch - 1] if epoch else 0)

    def sequences(self, step: int) -> list[np.ndarray]:
        """Return the global_batch slots of a step, each (n, 3) int64 [sample id, first token, number of tokens].

        Slots of the last step of an epoch that have no sequence are (0, 3).
        """
        return [self.index.pieces[members] for members in self._slots(step)]

    def num_target_tokens(self, step: int) -> int:
        """Return how many tokens the whole step learns: what its loss is divided by, known without reading data."""
        return sum(int(self.index.piece_targets[members].sum()) for members in self._slots(step))

    def samples_seen(self, step: int) -> np.ndarray:
        """Return (n, 3) int64: all pieces of a step, slot after slot; what the ledger records."""
        return self.index.pieces[np.concatenate(self._slots(step))]

    def _end(self, epoch: int) -> int:
        """Return the first step after an epoch; counting plans every epoch up to it once."""
        with self._lock:
            while len(self._ends) <= epoch:
                steps = -(-self.epoch(len(self._ends)).num_sequences // self.batch.global_batch)
                self._ends.append(steps + (self._ends[-1] if self._ends else 0))
            return self._ends[epoch]

    def _slots(self, step: int) -> list[np.ndarray]:
        """Return the piece numbers in each of a step's global_batch slots."""
        epoch, within = self.locate(step)
        plan = self.epoch(epoch)
        first = within * self.batch.global_batch
        bounds = plan.offsets[np.minimum(np.arange(first, first + self.batch.global_batch + 1), plan.num_sequences)]
        return [plan.members[start:stop] for start, stop in pairwise(bounds)]
