"""From the batch plan to batches: the tokens of this worker's lanes, padded and shifted.

Guarantees: a lane's batch has the same bytes in every world size; a target is predicted from tokens
of its own sample only; errors of the prefetching thread are raised where batches are consumed. The
thread ends with its iterator or, while it waits for a block to be tokenized, when the store is
closed. Knows no ranks: the caller passes the lanes.

Dimensions: B sequences (rows) of T tokens; N segments with L tokens in all; P segments and G
sequences of a block.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from threading import Lock

import numpy as np

from dist_ft.core.errors import DataError
from dist_ft.core.seeds import derive_seed
from dist_ft.data.batch import BadRows, Batch
from dist_ft.data.batching.assemble import BatchBuilder, SequenceTokens, read_segments
from dist_ft.data.batching.prefetch import build_ahead
from dist_ft.data.blocks.block_store import BlockStore
from dist_ft.data.blocks.index import Index
from dist_ft.data.blocks.segments import split_into_segments
from dist_ft.data.blocks.token_cache import max_open_blocks
from dist_ft.data.sampling.batch_plan import BatchPlan, SequenceRef
from dist_ft.data.sampling.packing import SequenceMembers, group_into_sequences
from dist_ft.data.sampling.stream_order import Cursor

CURSOR_COLUMNS = ("lane", "source", *Cursor._fields)
"""Columns of stored cursors."""
NUM_FACTS = 5
BLOCKS_AHEAD = 4
"""Blocks that are tokenized ahead of those in use, for each source."""


@dataclass(frozen=True)
class PackedBlock:
    """A block as an epoch sees it.

    Attributes:
        segments: int64 (P, 3) [row, first token, number of tokens].
        sequences: the segments of each of its G sequences.
    """

    segments: np.ndarray
    sequences: SequenceMembers

    def sequence(self, number: int) -> np.ndarray:
        """Return the segments of a sequence, (n, 3)."""
        members, offsets = self.sequences
        return self.segments[members[offsets[number] : offsets[number + 1]]]


class Loader:
    """Reads the batches of a plan."""

    def __init__(
        self,
        plan: BatchPlan,
        index: Index,
        store: BlockStore,
        prefetch_steps: int = 2,
        builder: BatchBuilder | None = None,
    ) -> None:
        """Store the settings; raise the process's soft limit of open files (`max_open_blocks`).

        Args:
            plan: which sequences each lane reads.
            index: index of the data set.
            store: its tokenized blocks.
            prefetch_steps: steps whose batches are built in the background.
            builder: builds batches; None: without masking and augmentation.
        """
        self.plan = plan
        self.index = index
        self.store = store
        self._prefetch_steps = prefetch_steps
        self._builder = builder or BatchBuilder()

        # A property that sums over all blocks: computed once, as every batch needs it.
        self._first_samples = index.first_samples
        self._max_samples = index.recipe.get("max_samples") or None
        self._packed: OrderedDict[tuple[int, int], PackedBlock] = OrderedDict()
        self._set_max_open_blocks(plan.num_lanes)
        self._lock = Lock()

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which each sequence occurs once; the last may be partial."""
        return self.plan.num_steps_in_epochs(1)

    def batches(self, step: int, lanes: Sequence[int]) -> list[Batch]:
        """Return one batch for each of `lanes` at `step`, from 0; a lane may be empty."""
        refs_by_lane = [self.plan.sequence_refs(step, lane) for lane in lanes]
        batches = []
        for refs, lane in zip(refs_by_lane, lanes, strict=True):
            batches.append(self._builder.build([self.sequence(ref) for ref in refs], lane))

        # only now: blocks of this step must not wait behind those of later steps
        for refs in refs_by_lane:
            self.request_ahead(refs)
        return batches

    def iterate(
        self, start: int, stop: int, lanes: Sequence[int]
    ) -> Generator[list[Batch], None, None]:
        """Yield `batches(step, lanes)` of steps start .. stop - 1.

        The next steps are built in a background thread.
        """
        self._set_max_open_blocks(len(lanes))
        yield from build_ahead(
            lambda step: self.batches(step, lanes), range(start, stop), self._prefetch_steps
        )

    def epochs_done(self, step: int) -> list[float]:
        """Return about how many of its epochs each source has completed before a step."""
        return self.plan.epochs_done(step)

    def cursors(self) -> np.ndarray:
        """Return no cursors (0, 6): the order of an index follows from the step."""
        return np.zeros((0, len(CURSOR_COLUMNS)), dtype=np.int64)

    def restore(self, step: int, cursors: np.ndarray) -> None:
        """Start from a checkpoint: nothing to do, as the order follows from the step."""

    def take_facts(self) -> np.ndarray:
        """Return no facts of slices (0, 5): the index has those of all blocks."""
        return np.zeros((0, NUM_FACTS), dtype=np.int64)

    def take_bad_rows(self) -> BadRows:
        """Return none: bad rows were counted when the index was built."""
        return BadRows()

    def close(self) -> None:
        """Stop reading ahead."""
        self.store.close()

    def packed(self, epoch: int, number: int) -> PackedBlock:
        """Return a block as packed in an epoch of its source. Safe over threads."""
        with self._lock:
            if (epoch, number) in self._packed:
                self._packed.move_to_end((epoch, number))
                return self._packed[epoch, number]

        # Outside the lock, as packing may wait for the block to be tokenized. Two threads that pack
        # the same block get the same result.
        packed = self._pack(epoch, number)

        with self._lock:
            self._packed[epoch, number] = packed
            if len(self._packed) > self.store.max_open_blocks:
                self._packed.popitem(last=False)
        return packed

    def _set_max_open_blocks(self, num_lanes: int) -> None:
        """Hold twice as many blocks open as the lanes read from at a time, if files allow it."""
        data = self.plan.data
        num_blocks = 2 * len(data.train) * (num_lanes + data.shuffle_blocks)
        self.store.max_open_blocks = max_open_blocks(num_blocks)

    def _pack(self, epoch: int, number: int) -> PackedBlock:
        """Return a block's segments and how an epoch groups them into sequences.

        Raises:
            DataError: the number of sequences differs from the index.
        """
        data = self.plan.data
        batch = self.plan.batch

        max_rows = None
        if self._max_samples is not None:
            max_rows = max(0, self._max_samples - int(self._first_samples[number]))
        segments, _ = split_into_segments(
            self.store.block(number), batch.sequence_length, data.overlong, max_rows
        )

        # each epoch packs other segments together, but into the same number of sequences
        seed = None
        if data.shuffle:
            seed = derive_seed(self.plan.seed, epoch, number)
        sequences = group_into_sequences(
            segments[:, 2],
            batch.sequence_length,
            data.pack,
            seed,
            sort_pool=(data.bucket or 0) * batch.micro_batch,
        )

        num_sequences = len(sequences.offsets) - 1
        num_indexed = self.index.block_stats[number].num_sequences
        # The plan addresses sequences by the index's counts: with others, samples would be lost.
        if num_sequences != num_indexed:
            raise DataError(
                f"data: block {number} has {num_sequences} sequences, but {num_indexed} in the "
                "run's index. Another version built the index. Resume with that version, or start "
                "a run with another run.name."
            )
        return PackedBlock(segments, sequences)

    def sequence(self, ref: SequenceRef) -> SequenceTokens:
        """Return the tokens of a sequence."""
        bounds = self.packed(ref.epoch, ref.block).sequence(ref.sequence)  # (n, 3)
        tokens, targets = read_segments(self.store.block(ref.block), bounds)

        row, first, size = bounds.T
        sample_ids = row + self._first_samples[ref.block]
        epochs = np.full(len(bounds), ref.epoch)
        segments = np.column_stack([sample_ids, first, size, epochs])
        return SequenceTokens(ref.source, tokens, targets, segments)

    def request_ahead(self, refs: Sequence[SequenceRef]) -> None:
        """Let the blocks that come next be tokenized, so that no step waits for one."""
        # The last sequence of each source and epoch: a lane that crosses into the next epoch reads
        # from two orders of blocks.
        last_by_epoch = {(ref.source, ref.epoch): ref for ref in refs}
        for ref in last_by_epoch.values():
            for number in self.plan.blocks_after(ref, BLOCKS_AHEAD):
                self.store.request(number)
