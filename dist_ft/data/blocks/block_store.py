"""The tokenized blocks of a data set: from memory, from the local cache, or tokenized now.

Guarantees: a worker tokenizes a block once, however often it is requested; with checksums from the
index, a block that is tokenized again must equal the first result, so that data that was altered
during a run cannot slip in. Knows nothing of packing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from threading import Lock
from typing import NamedTuple, NoReturn

from dist_ft.core.errors import DataError
from dist_ft.core.logs import redact
from dist_ft.data.block import END_OF_SHARD, Block
from dist_ft.data.blocks import token_cache
from dist_ft.data.blocks.block_writer import BlockWriter, evicted_at_once, unusable_cache
from dist_ft.data.blocks.token_cache import TokenizedBlock
from dist_ft.data.blocks.tokenizer_pool import TokenizerPool
from dist_ft.data.encoding.chat import Encoder
from dist_ft.data.sources import readers
from dist_ft.data.sources.discovery import Shard, require_unchanged

SMALL_BYTES = 8 * 2**20
"""The worker itself tokenizes a data set up to this size: a process would take longer to start."""
MAX_LOAD_TRIES = 3


class ReadPass(NamedTuple):
    """Identifies blocks that are best tokenized in one pass over their source.

    Attributes:
        shard: the shard that they share; `END_OF_SHARD` for a block that is read alone.
        group: the row group that they share, `END_OF_SHARD` for the whole shard; or the number of
            the block that is read alone.
    """

    shard: int
    group: int


class BlockStore:
    """The tokenized blocks of one data set.

    Attributes:
        checksums: checksums of all blocks, from the index; None: unknown.
        max_open_blocks: how many blocks are held open.
        writer: tokenizes blocks into the cache.
    """

    def __init__(
        self,
        folder: str | Path,
        encoder: Encoder,
        shards: Sequence[Shard],
        blocks: Sequence[Block],
        pool: TokenizerPool | None = None,
        limit_bytes: float = float("inf"),
    ) -> None:
        """Store the settings and compute the fingerprint of the encoder.

        Args:
            folder: folder of the local cache.
            encoder: rows to tokens.
            shards: shards of all sources.
            blocks: blocks of all sources.
            pool: processes that tokenize; None: this process does.
            limit_bytes: limit of the cache.
        """
        self.shards = tuple(shards)
        self.blocks = tuple(blocks)
        self.checksums: Sequence[str] | None = None
        self.max_open_blocks = 16

        self.writer = BlockWriter(folder, encoder, self.shards, limit_bytes)
        self._pool: TokenizerPool | None = None
        total_bytes = sum(block.num_bytes for block in blocks)
        if total_bytes > SMALL_BYTES:
            self._pool = pool

        # each process of the pool needs a thread that waits for it
        num_threads = 4
        if pool:
            num_threads = max(4, pool.size)
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="dist_ft-blocks")

        self._open: OrderedDict[int, TokenizedBlock] = OrderedDict()
        self._in_progress: dict[int, Future[None]] = {}
        self._blocks_by_pass: dict[ReadPass, list[int]] = {}
        for number in range(len(self.blocks)):
            self._blocks_by_pass.setdefault(self._read_pass(number), []).append(number)
        self._lock = Lock()

    @property
    def folder(self) -> Path:
        """The folder of the local cache."""
        return self.writer.folder

    @property
    def encoder(self) -> Encoder:
        """What makes tokens of rows."""
        return self.writer.encoder

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the encoder."""
        return self.writer.fingerprint

    def path(self, number: int) -> Path:
        """Return the path of a block's cache file, which need not exist."""
        return self.writer.path(self.blocks[number])

    def block(self, number: int) -> TokenizedBlock:
        """Return a block's tokens, tokenized now if they are not cached. Safe over threads.

        Raises:
            DataError: a shard vanished or changed, or holds a row that cannot be used.
            StorageError: the data or the cache cannot be read or written.
        """
        # Another writer may evict the block from the cache between the end of tokenizing and
        # opening the file: try again.
        for _ in range(MAX_LOAD_TRIES):
            try:
                with self._lock:
                    if number in self._open:
                        self._open.move_to_end(number)
                        return self._open[number]

                    block = token_cache.load_block(self.path(number))
                    if block is not None:
                        return self._hold_open(number, block)

                # Outside the lock: `request` takes it too, and threads that need other blocks must
                # not wait for this one.
                self.request(number).result()
            except OSError as error:
                raise unusable_cache(self.folder, error) from error

        raise evicted_at_once()

    def request(self, number: int, needed: Set[int] | None = None) -> Future[None]:
        """Start to tokenize a block unless it exists or is in progress; do not wait.

        Args:
            number: number of the block.
            needed: blocks that will be requested too: those of the same pass are tokenized with
                it. None: only those that would otherwise cost as much reading again.
        """
        with self._lock:
            if number in self._in_progress:
                return self._in_progress[number]

            if number in self._open or self.path(number).exists():
                ready: Future[None] = Future()
                ready.set_result(None)
                return ready

            numbers = self._blocks_to_tokenize(number, needed)
            future = self._threads.submit(self._tokenize, numbers)
            for each in numbers:
                self._in_progress[each] = future

        # Outside the lock: if the future is done by now, the callback runs here at once and takes
        # the lock itself.
        future.add_done_callback(lambda _: self._mark_done(numbers))
        return future

    def iter_blocks(self, numbers: Sequence[int]) -> Iterator[tuple[int, TokenizedBlock]]:
        """Yield (number, block) for ascending `numbers` while later passes are tokenized."""
        # twice the number of passes that run at a time, so that no process has to wait for work
        num_passes_ahead = 2
        if self._pool:
            num_passes_ahead = 2 * self._pool.size

        needed = frozenset(numbers)
        first_of_pass = [next(own) for _, own in groupby(numbers, self._read_pass)]
        pass_number = {number: i for i, number in enumerate(first_of_pass)}

        for number in numbers:
            # The first block of a pass starts the pass, and the passes after it. The other blocks
            # are then in progress already, unless they were evicted.
            current = pass_number.get(number)
            if current is None:
                self.request(number, needed)
            else:
                for first in first_of_pass[current : current + num_passes_ahead]:
                    self.request(first, needed)

            yield number, self.block(number)

            # each block is used once here, so its file need not stay open
            with self._lock:
                self._open.pop(number, None)

    def close(self) -> None:
        """Stop tokenizing blocks."""
        # First no new tasks, then end the processes that running tasks wait for, and only then wait
        # for the threads: they would otherwise wait until the processes finish.
        self._threads.shutdown(wait=False, cancel_futures=True)
        if self._pool is not None:
            self._pool.close()
        self._threads.shutdown(wait=True)

    def _hold_open(self, number: int, block: TokenizedBlock) -> TokenizedBlock:
        """Keep a block open and return it; refuse one that differs from the index."""
        if self.checksums is not None and block.checksum != self.checksums[number]:
            self._refuse_altered(number)

        self._open[number] = block
        if len(self._open) > self.max_open_blocks:
            self._open.popitem(last=False)
        return block

    def _refuse_altered(self, number: int) -> NoReturn:
        shard_numbers = dict.fromkeys(part.shard for part in self.blocks[number].ranges)
        shards = [self.shards[shard] for shard in shard_numbers]

        # The cached block must not outlive this error: once the data is restored, it is wrong.
        with suppress(OSError):
            self.path(number).unlink()

        for shard in shards:
            require_unchanged(shard)  # raises the more precise error

        urls = ", ".join(shard.url for shard in shards)
        raise DataError(
            redact(
                f"{urls}: gives other tokens than when the run started, though size and version "
                "are the same. Shards must not be altered while a run uses them. Restore the data, "
                "or start a run with another run.name."
            )
        )

    def _read_pass(self, number: int) -> ReadPass:
        """Return the pass of a block: over its shard, over a row group, or over the block alone."""
        # Only a block of one range lies in a single pass.
        first = self.blocks[number].ranges[0]
        if len(self.blocks[number].ranges) == 1:
            if readers.is_sequential(self.shards[first.shard]):
                return ReadPass(first.shard, END_OF_SHARD)
            if first.group != END_OF_SHARD:
                return ReadPass(first.shard, first.group)
        return ReadPass(END_OF_SHARD, number)

    def _blocks_to_tokenize(self, number: int, needed: Set[int] | None) -> list[int]:
        """Return the blocks that one pass tokenizes: those of `needed` that are missing.

        By default these are all blocks of a shard that must be read from its start, but only this
        block of a row group: tokenizing blocks that other nodes use costs more than reading the
        group again.
        """
        read_pass = self._read_pass(number)
        if needed is None and read_pass.group != END_OF_SHARD:
            return [number]

        missing = []
        for peer in self._blocks_by_pass[read_pass]:
            is_needed = needed is None or peer in needed
            if is_needed and peer not in self._in_progress and not self.path(peer).exists():
                missing.append(peer)

        # Another process may have written it by now. The caller still gets a future of its own.
        if number not in missing:
            return [number]
        return missing

    def _mark_done(self, numbers: Sequence[int]) -> None:
        with self._lock:
            for number in numbers:
                self._in_progress.pop(number, None)

    def _tokenize(self, numbers: Sequence[int]) -> None:
        """Tokenize blocks of one pass."""
        # with checksums, a shard that was altered is noticed by its tokens
        blocks = [self.blocks[number] for number in numbers]
        self.writer.write(blocks, check=self.checksums is None, pool=self._pool)
