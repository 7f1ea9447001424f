"""From the plan to batches: tokens of the lanes this worker runs, padded and shifted.

Guarantees: a lane's batch is the same bytes in every world; a target is predicted from tokens of its own sample only;
errors of the prefetching thread are raised where batches are consumed, and the thread ends with its iterator. Knows
no ranks: the caller says which lanes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from dist_ft.config.schema import BatchSection
from dist_ft.data.batch import IGNORED, Batch, empty_batch
from dist_ft.data.cache import TokenCache
from dist_ft.data.index import Index
from dist_ft.data.plan import Plan

PREFETCHED_STEPS = 2


class Loader:
    """Reads the batches of a plan."""

    def __init__(self, plan: Plan, index: Index, cache: TokenCache, batch: BatchSection) -> None:
        """Assign only."""
        self.plan = plan
        self.index = index
        self.cache = cache
        self.batch = batch

    def batches(self, step: int, lanes: Sequence[int]) -> list[Batch]:
        """Return one batch for each of `lanes` at `step` (from 0); a lane with no sequence gives an empty batch."""
        slots = self.plan.sequences(step)
        size = self.batch.micro_batch
        return [self._lane(slots[lane * size:(lane + 1) * size], lane) for lane in lanes]

    def iterate(self, start: int, stop: int, lanes: Sequence[int]) -> Generator[list[Batch], None, None]:
        """Yield `batches(step, lanes)` of steps start .. stop - 1, the next two being made in a background thread."""
        pool = ThreadPoolExecutor(1, thread_name_prefix="dist_ft-loader")
        ahead: deque[Future[list[Batch]]] = deque()
        try:
            for step in range(start, stop):
                ahead.append(pool.submit(self.batches, step, lanes))
                if len(ahead) > PREFETCHED_STEPS:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _lane(self, slots: Sequence[np.ndarray], lane: int) -> Batch:
        rows = [pieces for pieces in slots if len(pieces)]
        if not rows:
            return empty_batch(lane=lane)
        pieces = np.concatenate(rows)
        tokens, learned = self._tokens(pieces)
        return assemble(tokens, learned, pieces, np.repeat(np.arange(len(rows)), [len(row) for row in rows]), lane)

    def _tokens(self, pieces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return tokens and targets of pieces (n, 3), one after the other."""
        numbers = np.searchsorted(self.index.row_offsets, pieces[:, 0], side="right") - 1
        tokens, learned = [], []
        for number, (sample, first, size) in zip(numbers.tolist(), pieces.tolist(), strict=True):
            shard = self.cache.shard(self.index.shards[number])
            start = int(shard.offsets[sample - self.index.row_offsets[number]]) + first
            tokens.append(shard.tokens[start:start + size])
            learned.append(shard.targets[start:start + size])
        return np.concatenate(tokens), np.concatenate(learned)


def assemble(tokens: np.ndarray, learned: np.ndarray, pieces: np.ndarray, rows: np.ndarray, lane: int) -> Batch:
    """Return the batch of pieces laid one after the other, row by row.

    Args:
        tokens: (sum,) token ids of all pieces.
        learned: (sum,) 1 where a token is a target.
        pieces: (n, 3) [sample id, first token, number of tokens].
        rows: (n,) the row of each piece, ascending from 0.
        lane: recorded in the batch.
    """
    sizes = pieces[:, 2]
    ends = np.cumsum(sizes)
    fill = np.bincount(rows, weights=sizes).astype(np.int64)
    shape = (len(fill), int(fill.max()))
    within = np.arange(len(tokens)) - np.repeat(ends - sizes, sizes)
    row_starts = np.cumsum(fill) - fill
    places = np.repeat(rows * shape[1] + (ends - sizes) - row_starts[rows], sizes) + within

    follows = np.append(learned[1:], 0).astype(bool)
    follows[ends - 1] = False
    target_ids = np.full(shape, IGNORED, dtype=np.int64)
    target_ids.reshape(-1)[places] = np.where(follows, np.append(tokens[1:], 0), IGNORED)
    input_ids = np.zeros(shape, dtype=np.int64)
    input_ids.reshape(-1)[places] = tokens
    position_ids = np.arange(shape[1], dtype=np.int64)[None, :] - fill[:, None]
    position_ids.reshape(-1)[places] = within
    return Batch(input_ids, target_ids, position_ids, pieces, lane)
