"""From the batch plan to batches: the tokens of this worker's lanes, padded and shifted.

Guarantees: a lane's batch has the same bytes in every world size; a target is predicted from tokens
of its own sample only; errors of the prefetching thread are raised where batches are consumed. The
thread ends with its iterator or, while it waits for a block to be tokenized, when the store is
closed. Knows no ranks: the caller passes the lanes.

Dimensions: B sequences (rows) of T tokens; N segments with L tokens in all; P segments and G
sequences of a block.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from itertools import pairwise
from threading import Lock

import numpy as np

from dist_ft.core.errors import DataError
from dist_ft.core.seeds import derive_seed
from dist_ft.data.batch import IGNORE_INDEX, Batch, empty_batch
from dist_ft.data.batching.augmentation import Augmentation
from dist_ft.data.batching.masking import Masking
from dist_ft.data.blocks.block_store import BlockStore
from dist_ft.data.blocks.index import Index
from dist_ft.data.blocks.segments import split_into_segments
from dist_ft.data.blocks.token_cache import max_open_blocks
from dist_ft.data.sampling.batch_plan import BatchPlan, SequenceRef
from dist_ft.data.sampling.packing import SequenceMembers, group_into_sequences

BLOCKS_AHEAD = 4
"""Blocks that are tokenized ahead of those in use, for each source."""
CLOSE_S = 1.0
"""How long the end of an iteration waits for the prefetching thread."""


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
        masking: Masking | None = None,
        augmentation: Augmentation | None = None,
    ) -> None:
        """Store the settings; raise the process's soft limit of open files (`max_open_blocks`).

        Args:
            plan: which sequences each lane reads.
            index: index of the data set.
            store: its tokenized blocks.
            prefetch_steps: steps whose batches are built in the background.
            masking: masking of a masked language model; None: no masking.
            augmentation: augmentation of training texts; None: no augmentation.
        """
        self.plan = plan
        self.index = index
        self.store = store
        self._prefetch_steps = prefetch_steps
        self._masking = masking
        self._augmentation = augmentation

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
        batches = [self._batch(refs, lane) for refs, lane in zip(refs_by_lane, lanes, strict=True)]

        # only now: blocks of this step must not wait behind those of later steps
        for refs in refs_by_lane:
            self._request_ahead(refs)
        return batches

    def iterate(
        self, start: int, stop: int, lanes: Sequence[int]
    ) -> Generator[list[Batch], None, None]:
        """Yield `batches(step, lanes)` of steps start .. stop - 1.

        The next steps are built in a background thread.
        """
        self._set_max_open_blocks(len(lanes))
        # one thread, so that steps are built in order
        pool = ThreadPoolExecutor(1, thread_name_prefix="dist_ft-loader")
        pending: deque[Future[list[Batch]]] = deque()
        try:
            for step in range(start, stop):
                pending.append(pool.submit(self.batches, step, lanes))
                if len(pending) > self._prefetch_steps:
                    # raises here what the thread raised
                    yield pending.popleft().result()

            while pending:
                yield pending.popleft().result()
        finally:
            # Also runs when the consumer stops early. A thread that waits for a block to be
            # tokenized cannot be interrupted, so waiting for it has a limit; closing the store ends
            # it.
            pool.shutdown(wait=False, cancel_futures=True)
            running = [future for future in pending if not future.cancelled()]
            is_busy = bool(wait(running, CLOSE_S).not_done)
            pool.shutdown(wait=not is_busy)

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

    def _batch(self, refs: Sequence[SequenceRef], lane: int) -> Batch:
        """Return the batch of a lane: its sequences, one a row."""
        if not refs:
            return empty_batch(lane=lane)

        token_parts: list[np.ndarray] = []
        target_parts: list[np.ndarray] = []
        segments_by_row: list[np.ndarray] = []
        row_sources: list[tuple[int, int]] = []
        for ref in refs:
            bounds = self.packed(ref.epoch, ref.block).sequence(ref.sequence)  # (n, 3)
            row, first, size = bounds.T

            block = self.store.block(ref.block)
            starts = block.offsets[row] + first
            for start, stop in zip(starts.tolist(), (starts + size).tolist(), strict=True):
                token_parts.append(block.tokens[start:stop])
                target_parts.append(block.targets[start:stop])

            # The segments are as stored in the data: masks, augmentation and the ledger identify a
            # sample by them.
            sample_ids = row + self._first_samples[ref.block]
            epochs = np.full(len(bounds), ref.epoch)
            segments_by_row.append(np.column_stack([sample_ids, first, size, epochs]))
            row_sources.append((ref.source, size.sum()))

        tokens = np.concatenate(token_parts)  # (L,)
        targets = np.concatenate(target_parts)  # (L,)
        segments = np.concatenate(segments_by_row)  # (N, 4)
        segments_per_row = [len(own) for own in segments_by_row]
        rows = np.repeat(np.arange(len(refs)), segments_per_row)  # (N,)

        if self._masking is not None:
            tokens, targets = self._masking.apply(tokens, targets, segments)
        lengths = None
        if self._augmentation is not None:
            tokens, targets, lengths = self._augmentation.apply(tokens, targets, segments)

        batch = assemble_batch(tokens, targets, segments, rows, lane, lengths)
        return replace(batch, row_sources=np.array(row_sources))

    def _request_ahead(self, refs: Sequence[SequenceRef]) -> None:
        """Let the blocks that come next be tokenized, so that no step waits for one."""
        # The last sequence of each source and epoch: a lane that crosses into the next epoch reads
        # from two orders of blocks.
        last_by_epoch = {(ref.source, ref.epoch): ref for ref in refs}
        for ref in last_by_epoch.values():
            for number in self.plan.blocks_after(ref, BLOCKS_AHEAD):
                self.store.request(number)


def assemble_batch(
    tokens: np.ndarray,
    targets: np.ndarray,
    segments: np.ndarray,
    rows: np.ndarray,
    lane: int,
    changed_lengths: np.ndarray | None = None,
) -> Batch:
    """Return the batch of consecutive segments, row by row.

    Args:
        tokens: (L,) token ids of all segments.
        targets: (L,) uint8: 1 where a token is a next-token target; or int32: labels, which keep
            their positions.
        segments: (N, 4) [sample id, first token, number of tokens, epoch].
        rows: (N,) the row of each segment, ascending from 0.
        lane: stored in the batch.
        changed_lengths: (N,) tokens of each segment, if they differ from `segments`.
    """
    lengths = changed_lengths
    if lengths is None:
        lengths = segments[:, 2]
    ends = np.cumsum(lengths)  # (N,)

    # labels belong to their own position; marks of next-token targets are shifted by one
    flat_targets = targets  # (L,)
    if targets.dtype != np.int32:
        flat_targets = _next_token_targets(tokens, targets, ends)
    flat_positions = np.arange(len(tokens)) - np.repeat(ends - lengths, lengths)

    # a row ends with its last segment
    last_segments = np.append(np.flatnonzero(np.diff(rows)), len(rows) - 1)  # (B,)
    row_edges = [0, *ends[last_segments].tolist()]
    num_rows = len(row_edges) - 1
    num_tokens = max(stop - start for start, stop in pairwise(row_edges))

    input_ids = np.zeros((num_rows, num_tokens), dtype=np.int64)
    target_ids = np.full((num_rows, num_tokens), IGNORE_INDEX, dtype=np.int64)
    position_ids = np.empty((num_rows, num_tokens), dtype=np.int64)
    for row, (start, stop) in enumerate(pairwise(row_edges)):
        length = stop - start
        input_ids[row, :length] = tokens[start:stop]
        target_ids[row, :length] = flat_targets[start:stop]
        position_ids[row, :length] = flat_positions[start:stop]
        # positions restart at 0 where a sample starts, so the padding is a sample of its own
        position_ids[row, length:] = np.arange(num_tokens - length)

    return Batch(
        input_ids, target_ids, position_ids, segments, lane, changed_lengths=changed_lengths
    )


def _next_token_targets(tokens: np.ndarray, is_target: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Return the next token of the same segment where it is a target, else `IGNORE_INDEX`.

    Args:
        tokens: (L,) token ids.
        is_target: (L,) 1 where a token is a target.
        ends: (N,) the position after each segment.

    Returns:
        (L,), of the type of `tokens`.
    """
    next_is_target = np.zeros(len(tokens), dtype=bool)
    next_is_target[:-1] = is_target[1:]
    next_is_target[ends - 1] = False  # the next token belongs to another segment

    targets = np.full(len(tokens), IGNORE_INDEX, dtype=tokens.dtype)
    np.copyto(targets[:-1], tokens[1:], where=next_is_target[:-1])
    return targets
