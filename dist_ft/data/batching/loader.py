"""From the plan to batches: tokens of the lanes this worker runs, padded and shifted.

Guarantees: a lane's batch is the same bytes in every world; a target is predicted from tokens of its own sample only;
errors of the prefetching thread are raised where batches are consumed, and the thread ends with its iterator, or, where
it waits for a block that is being made, once the store is closed. Knows no ranks: the caller says which lanes.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from threading import Lock

import numpy as np

from dist_ft.core.errors import DataError
from dist_ft.data.batch import IGNORED, Batch, empty_batch
from dist_ft.data.batching.augmentation import Augmenting
from dist_ft.data.batching.masking import Masking
from dist_ft.data.blocks.block_store import BlockStore
from dist_ft.data.blocks.index import Index
from dist_ft.data.blocks.segments import pieces_of
from dist_ft.data.blocks.token_cache import most_open
from dist_ft.data.sampling.batch_plan import Plan, Slot
from dist_ft.data.sampling.packing import sequences_of
from dist_ft.data.sampling.shuffle import mix

BLOCKS_AHEAD = 4
CLOSE_S = 1.0


@dataclass(frozen=True)
class PackedBlock:
    """A block as an epoch sees it.

    Attributes:
        pieces: (P, 3) int64 [row, first token, number of tokens].
        members: (P,) piece numbers, sequence after sequence.
        offsets: (G + 1,): sequence g is members[offsets[g]:offsets[g + 1]].
    """

    pieces: np.ndarray
    members: np.ndarray
    offsets: np.ndarray

    def sequence(self, number: int) -> np.ndarray:
        """Return the pieces (n, 3) of a sequence."""
        return self.pieces[self.members[self.offsets[number] : self.offsets[number + 1]]]


class Loader:
    """Reads the batches of a plan."""

    def __init__(
        self,
        plan: Plan,
        index: Index,
        store: BlockStore,
        prefetch_steps: int = 2,
        masking: Masking | None = None,
        augmenting: Augmenting | None = None,
    ) -> None:
        """Assign only; the process's soft limit of open files is raised (`cache.most_open`)."""
        self.plan = plan
        self.index = index
        self.store = store
        self._prefetch_steps = prefetch_steps
        self._masking = masking
        self._augmenting = augmenting
        self._first_samples = index.first_samples
        self._limit = index.recipe.get("max_samples") or None
        self._packed: OrderedDict[tuple[int, int], PackedBlock] = OrderedDict()
        self._hold(plan.num_lanes)
        self._lock = Lock()

    @property
    def steps_of_a_pass(self) -> int:
        """Steps in which every sequence comes once; the last may be partial."""
        return self.plan.steps_of(1)

    def batches(self, step: int, lanes: Sequence[int]) -> list[Batch]:
        """Return one batch for each of `lanes` at `step` (from 0); a lane with no sequence gives an empty batch."""
        slots = [self.plan.slots(step, lane) for lane in lanes]
        found = [self._lane(own, lane) for own, lane in zip(slots, lanes, strict=True)]
        for own in slots:
            self._ask_ahead(own)
        return found

    def iterate(
        self, start: int, stop: int, lanes: Sequence[int]
    ) -> Generator[list[Batch], None, None]:
        """Yield `batches(step, lanes)` of steps start .. stop - 1, the next ones being made in a background thread."""
        self._hold(len(lanes))
        pool = ThreadPoolExecutor(1, thread_name_prefix="dist_ft-loader")
        ahead: deque[Future[list[Batch]]] = deque()
        try:
            for step in range(start, stop):
                ahead.append(pool.submit(self.batches, step, lanes))
                if len(ahead) > self._prefetch_steps:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            busy = wait([one for one in ahead if not one.cancelled()], CLOSE_S).not_done
            pool.shutdown(wait=not busy)

    def packed(self, epoch: int, number: int) -> PackedBlock:
        """Return a block as packed in an epoch of its source. Safe over threads."""
        with self._lock:
            if (epoch, number) in self._packed:
                self._packed.move_to_end((epoch, number))
                return self._packed[epoch, number]
        found = self._pack(epoch, number)
        with self._lock:
            self._packed[epoch, number] = found
            if len(self._packed) > self.store.most_open:
                self._packed.popitem(last=False)
        return found

    def _hold(self, num_lanes: int) -> None:
        """Keep as many blocks open as so many lanes read from at a time, and as many again, if files may be."""
        self.store.most_open = most_open(
            2 * len(self.plan.data.train) * (num_lanes + self.plan.data.shuffle_blocks)
        )

    def _pack(self, epoch: int, number: int) -> PackedBlock:
        data, length = self.plan.data, self.plan.batch.sequence_length
        block = self.store.block(number)
        rows = (
            None if self._limit is None else max(0, self._limit - int(self._first_samples[number]))
        )
        pieces, _ = pieces_of(block, length, data.overlong, rows)
        seed = mix(self.plan.seed, epoch, number) if data.shuffle else None
        members, offsets = sequences_of(
            pieces[:, 2], length, data.pack, seed, (data.bucket or 0) * self.plan.batch.micro_batch
        )
        if len(offsets) - 1 != self.index.measures[number].num_sequences:
            raise DataError(
                f"data: block {number} makes {len(offsets) - 1} sequences, the run's index says "
                f"{self.index.measures[number].num_sequences}; the index was made by another version; "
                "go on with that one, or start a run with another run.name"
            )
        return PackedBlock(pieces, members, offsets)

    def _lane(self, slots: Sequence[Slot], lane: int) -> Batch:
        if not slots:
            return empty_batch(lane=lane)
        rows, tokens, learned = [], [], []
        for slot in slots:
            pieces = self.packed(slot.epoch, slot.block).sequence(slot.sequence)
            block = self.store.block(slot.block)
            starts = block.offsets[pieces[:, 0]] + pieces[:, 1]
            for start, stop in zip(starts.tolist(), (starts + pieces[:, 2]).tolist(), strict=True):
                tokens.append(block.tokens[start:stop])
                learned.append(block.targets[start:stop])
            rows.append(
                np.column_stack(
                    [
                        pieces[:, 0] + self._first_samples[slot.block],
                        pieces[:, 1:],
                        np.full(len(pieces), slot.epoch),
                    ]
                )
            )
        numbers = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
        sources = np.array(
            [(slot.source, row[:, 2].sum()) for slot, row in zip(slots, rows, strict=True)]
        )
        flat, wanted, pieces = np.concatenate(tokens), np.concatenate(learned), np.concatenate(rows)
        if self._masking is not None:
            flat, wanted = self._masking.apply(flat, wanted, pieces)
        sizes = None
        if self._augmenting is not None:
            flat, wanted, sizes = self._augmenting.apply(flat, wanted, pieces)
        return replace(assemble(flat, wanted, pieces, numbers, lane, sizes), sources=sources)

    def _ask_ahead(self, slots: Sequence[Slot]) -> None:
        """Let blocks be made that come next, so that no step waits for one."""
        for slot in {(slot.source, slot.epoch): slot for slot in slots}.values():
            for number in self.plan.blocks_after(slot, BLOCKS_AHEAD):
                self.store.request(number)


def assemble(
    tokens: np.ndarray,
    learned: np.ndarray,
    pieces: np.ndarray,
    rows: np.ndarray,
    lane: int,
    changed: np.ndarray | None = None,
) -> Batch:
    """Return the batch of pieces laid one after the other, row by row.

    Args:
        tokens: (sum,) token ids of all pieces.
        learned: (sum,) uint8: 1 where a token is a target; or int32: labels, which stay where they are.
        pieces: (n, 4) [sample id, first token, number of tokens, epoch].
        rows: (n,) the row of each piece, ascending from 0.
        lane: recorded in the batch.
        changed: (n,) tokens of each piece, if not as `pieces` say.
    """
    sizes = pieces[:, 2] if changed is None else changed
    ends = np.cumsum(sizes)
    targets = learned if learned.dtype == np.int32 else _shifted(tokens, learned, ends)
    positions = np.arange(len(tokens)) - np.repeat(ends - sizes, sizes)

    stops = ends[np.append(np.flatnonzero(np.diff(rows)), len(rows) - 1)].tolist()
    starts = [0, *stops[:-1]]
    shape = (len(stops), max(stop - start for start, stop in zip(starts, stops, strict=True)))
    input_ids = np.zeros(shape, dtype=np.int64)
    target_ids = np.full(shape, IGNORED, dtype=np.int64)
    position_ids = np.empty(shape, dtype=np.int64)
    for row, (start, stop) in enumerate(zip(starts, stops, strict=True)):
        fill = stop - start
        input_ids[row, :fill] = tokens[start:stop]
        target_ids[row, :fill] = targets[start:stop]
        position_ids[row, :fill] = positions[start:stop]
        position_ids[row, fill:] = np.arange(shape[1] - fill)
    return Batch(input_ids, target_ids, position_ids, pieces, lane, sizes=changed)


def _shifted(tokens: np.ndarray, learned: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Return, (sum,), at each token the one that follows within its piece if that is a target, else IGNORED."""
    follows = np.zeros(len(tokens), dtype=bool)
    follows[:-1] = learned[1:]
    follows[ends - 1] = False
    targets = np.full(len(tokens), IGNORED, dtype=tokens.dtype)
    np.copyto(targets[:-1], tokens[1:], where=follows[:-1])
    return targets
