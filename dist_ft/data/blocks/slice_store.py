"""The tokenized slices of the sources that stream: from the local cache, or tokenized now.

Guarantees: a worker tokenizes a slice once, however often it is requested; a slice that comes again
must equal the first result, so that data that was altered during a run cannot slip in. Knows
nothing of packing.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

import numpy as np

from dist_ft.core.errors import DataError
from dist_ft.core.logs import redact
from dist_ft.data.block import Block
from dist_ft.data.blocks import token_cache
from dist_ft.data.blocks.block_writer import BlockWriter, evicted_at_once, unusable_cache
from dist_ft.data.blocks.slices import Slices
from dist_ft.data.blocks.token_cache import TokenizedBlock
from dist_ft.data.blocks.tokenizer_pool import TokenizerPool
from dist_ft.data.encoding.chat import Encoder

SMALL_BYTES = 2**20
"""The worker itself tokenizes up to this at a time: a process would take longer to start."""
MAX_LOAD_TRIES = 3


@dataclass(frozen=True)
class SliceFacts:
    """What a slice holds.

    Attributes:
        num_rows: its rows, including those that are left out.
        num_bad: rows that could not be used.
        num_segments: segments that are trained on.
        checksum: first 63 bits of the checksum of its tokens and targets.
    """

    num_rows: int
    num_bad: int
    num_segments: int
    checksum: int


class SliceStore:
    """The tokenized slices of one data set.

    Attributes:
        slices: which ranges each slice reads.
    """

    def __init__(
        self,
        folder: str | Path,
        encoder: Encoder,
        slices: Slices,
        pool: TokenizerPool | None = None,
        limit_bytes: float = float("inf"),
    ) -> None:
        """Store the settings and compute the fingerprint of the encoder.

        Args:
            folder: folder of the local cache.
            encoder: rows to tokens.
            slices: which ranges each slice reads.
            pool: processes that tokenize; None: this process does.
            limit_bytes: limit of the cache.
        """
        self.slices = slices
        self.writer = BlockWriter(folder, encoder, slices.shards, limit_bytes)
        self._pool = pool
        token_cache.max_open_blocks(token_cache.MAX_OPEN_FILES)  # raises the limit of open files

        # each process of the pool needs a thread that waits for it
        num_threads = 4
        if pool:
            num_threads = max(4, 2 * pool.size)
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="dist_ft-slices")

        self._in_progress: dict[int, Future[None]] = {}
        self._checksums: dict[int, int] = {}
        self._recorded: set[int] = set()
        self._new_facts: dict[int, SliceFacts] = {}
        self._lock = Lock()

    @property
    def encoder(self) -> Encoder:
        """What makes tokens of rows."""
        return self.writer.encoder

    def request(self, numbers: Sequence[int]) -> Future[None]:
        """Start to tokenize slices, in one pass, unless they exist or are in progress; do not wait.

        Returns:
            A future of all of them.
        """
        with self._lock:
            missing = [number for number in numbers if number not in self._in_progress]
            waited = {self._in_progress[n] for n in numbers if n in self._in_progress}
            future = self._threads.submit(self._tokenize, missing, waited)
            for number in missing:
                self._in_progress[number] = future

        # Outside the lock: if the future is done by now, the callback runs here at once and takes
        # the lock itself.
        future.add_done_callback(lambda _: self._mark_done(missing, future))
        return future

    def read(self, number: int) -> TokenizedBlock:
        """Return a slice's tokens, tokenized now if they are not cached. Safe over threads.

        Raises:
            DataError: a shard vanished or changed, or holds a row that cannot be used.
            StorageError: the data or the cache cannot be read or written.
        """
        block = self.slices.block(number)
        if not block.ranges:
            return token_cache.EMPTY_BLOCK

        path = self.writer.path(block)
        try:
            # Another writer may evict the slice from the cache between the end of tokenizing and
            # opening the file: try again.
            for _ in range(MAX_LOAD_TRIES):
                tokenized = token_cache.load_block(path)
                if tokenized is not None:
                    self._require_same(number, block, tokenized, path)
                    return tokenized
                self.request([number]).result()
        except OSError as error:
            raise unusable_cache(self.writer.folder, error) from error

        raise evicted_at_once()

    def add_facts(self, number: int, facts: SliceFacts) -> None:
        """Record what a slice holds, for `take_facts`, unless it is recorded already."""
        with self._lock:
            if number not in self._recorded:
                self._recorded.add(number)
                self._new_facts[number] = facts
            self._checksums[number] = facts.checksum

    def record_facts_again(self) -> None:
        """Record facts again when their slices are read again.

        After a rollback: those that were taken since the checkpoint are in no committed ledger.
        """
        with self._lock:
            self._recorded.clear()

    def take_facts(self) -> np.ndarray:
        """Return the facts of slices that were read since the last call.

        int64 (n, 5): number of the slice, rows, bad rows, segments, checksum.
        """
        with self._lock:
            rows = [
                [number, facts.num_rows, facts.num_bad, facts.num_segments, facts.checksum]
                for number, facts in self._new_facts.items()
            ]
            self._new_facts = {}
        return np.array(rows, dtype=np.int64).reshape(-1, 5)

    def close(self) -> None:
        """Stop tokenizing slices."""
        # First no new tasks, then end the processes that running tasks wait for, and only then wait
        # for the threads: they would otherwise wait until the processes finish.
        self._threads.shutdown(wait=False, cancel_futures=True)
        if self._pool is not None:
            self._pool.close()
        self._threads.shutdown(wait=True)

    def _tokenize(self, numbers: Sequence[int], others: set[Future[None]]) -> None:
        """Tokenize slices in one pass, and wait for those that other passes tokenize."""
        # In the order of the source, which one pass needs: a window may hold blocks in any order.
        blocks = [self.slices.block(number) for number in sorted(numbers)]
        blocks = [block for block in blocks if block.ranges]
        missing = [block for block in blocks if not self.writer.path(block).exists()]
        if missing:
            num_bytes = sum(block.num_bytes for block in missing)
            pool = self._pool if num_bytes > SMALL_BYTES else None
            self.writer.write(missing, check=True, pool=pool)

        for other in others:
            other.result()

    def _mark_done(self, numbers: Sequence[int], future: Future[None]) -> None:
        with self._lock:
            for number in numbers:
                if self._in_progress.get(number) is future:
                    del self._in_progress[number]

    def _require_same(
        self, number: int, block: Block, tokenized: TokenizedBlock, path: Path
    ) -> None:
        """Raise DataError if a slice differs from what it was when it was read before."""
        known = self._checksums.get(number)
        if known is None or known == short_checksum(tokenized):
            return

        # The cached slice must not outlive this error: once the data is restored, it is wrong.
        with suppress(OSError):
            path.unlink()
        urls = dict.fromkeys(self.slices.shards[part.shard].url for part in block.ranges)
        raise DataError(
            redact(
                f"{', '.join(urls)}: gives other tokens than when the run first read it, though "
                "size and version are the same. Shards must not be altered while a run uses them. "
                "Restore the data, or start a run with another run.name."
            )
        )


def short_checksum(block: TokenizedBlock) -> int:
    """Return the first 63 bits of a block's checksum."""
    return int(block.checksum[:16], 16) >> 1
