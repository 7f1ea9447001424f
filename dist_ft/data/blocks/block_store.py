"""The blocks of a data set as tokens: from memory, from the local cache, or made now, here or in processes beside.

Guarantees: a block is made once by a worker however often it is asked for; with checksums from the index, a block that
is made again must be what it was then, so that data altered under a run can not slip in. Knows nothing of packing.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterator, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from threading import Lock

from dist_ft.core.errors import DataError, StorageError
from dist_ft.core.logs import redact
from dist_ft.data.block import END, Block
from dist_ft.data.blocks import token_cache
from dist_ft.data.blocks.token_cache import TokenisedBlock
from dist_ft.data.blocks.tokenize_blocks import pack_task, run_task
from dist_ft.data.blocks.tokenizer_pool import TokeniserPool
from dist_ft.data.encoding.chat import Encoder
from dist_ft.data.sources import readers
from dist_ft.data.sources.discovery import Shard, require_unchanged

LOCK_TIMEOUT_S = 1800.0
SMALL_BYTES = 8 * 2**20
"""A data set up to this size is tokenised by the worker itself: a process would take longer to start."""

log = logging.getLogger(__name__)


class BlockStore:
    """The tokenised blocks of one data set."""

    def __init__(
        self,
        folder: str | Path,
        encoder: Encoder,
        shards: Sequence[Shard],
        blocks: Sequence[Block],
        pool: TokeniserPool | None = None,
        limit_bytes: float = float("inf"),
    ) -> None:
        """Assign only; the fingerprint of the encoder is computed. Without `pool` this process tokenises."""
        self.folder = Path(folder)
        self.encoder = encoder
        self.shards = tuple(shards)
        self.blocks = tuple(blocks)
        self.checksums: Sequence[str] | None = None
        self.most_open = 16
        self.fingerprint = token_cache.fingerprint(encoder)
        self._pool = pool if sum(block.num_bytes for block in blocks) > SMALL_BYTES else None
        self._limit_bytes = limit_bytes
        self._threads = ThreadPoolExecutor(
            max(4, pool.size if pool else 0), thread_name_prefix="dist_ft-blocks"
        )
        self._open: OrderedDict[int, TokenisedBlock] = OrderedDict()
        self._making: dict[int, Future[None]] = {}
        self._passes: dict[tuple[int, int], list[int]] = {}
        for number in range(len(self.blocks)):
            self._passes.setdefault(self._pass(number), []).append(number)
        self._lock = Lock()

    def path(self, number: int) -> Path:
        """Return the cache file of a block, there or not."""
        return (
            self.folder
            / f"{token_cache.key(self.fingerprint, self.blocks[number], self.shards)}.safetensors"
        )

    def block(self, number: int) -> TokenisedBlock:
        """Return a block's tokens, made now if need be. Safe over threads.

        Raises:
            DataError: a shard vanished or changed, or holds a row that can not be used.
            StorageError: the data or the cache can not be read or written.
        """
        for _ in range(3):
            try:
                with self._lock:
                    if number in self._open:
                        self._open.move_to_end(number)
                        return self._open[number]
                    found = token_cache.load_block(self.path(number))
                    if found is not None:
                        return self._keep(number, found)
                self.request(number).result()
            except OSError as error:
                raise StorageError(
                    f"data.cache_dir={self.folder}: can not be used ({error}); a local folder with room "
                    "for 5 bytes a token is needed; name another"
                ) from error
        raise StorageError(
            f"data.cache_dir={self.folder}: blocks vanish as soon as they are made; data.cache_gib must "
            "hold those in use; raise it"
        )

    def request(self, number: int, wanted: Set[int] | None = None) -> Future[None]:
        """Begin to make a block unless it is there or being made; do not wait.

        Blocks that come with it are made in the same pass: those of them that are `wanted`; None: all that could only
        be had by reading as much again.
        """
        with self._lock:
            if number in self._making:
                return self._making[number]
            if number in self._open or self.path(number).exists():
                ready: Future[None] = Future()
                ready.set_result(None)
                return ready
            together = self._together(number, wanted)
            future = self._threads.submit(self._make, together)
            for each in together:
                self._making[each] = future
        future.add_done_callback(lambda _: self._made(together))
        return future

    def each(self, numbers: Sequence[int]) -> Iterator[tuple[int, TokenisedBlock]]:
        """Yield (number, block) for ascending `numbers`, those of later passes being made meanwhile."""
        ahead, wanted = 2 * (self._pool.size if self._pool else 1), frozenset(numbers)
        starts = [next(own) for _, own in groupby(numbers, self._pass)]
        passes = dict(zip(starts, range(len(starts)), strict=True))
        for number in numbers:
            at = passes.get(number)
            for coming in [number] if at is None else starts[at : at + ahead]:
                self.request(coming, wanted)
            yield number, self.block(number)
            with self._lock:
                self._open.pop(number, None)

    def close(self) -> None:
        """Stop making blocks."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        if self._pool is not None:
            self._pool.close()
        self._threads.shutdown(wait=True)

    def _keep(self, number: int, found: TokenisedBlock) -> TokenisedBlock:
        if self.checksums is not None and found.checksum != self.checksums[number]:
            shards = list(
                dict.fromkeys(self.shards[part.shard] for part in self.blocks[number].parts)
            )
            with suppress(OSError):
                self.path(number).unlink()
            for shard in shards:
                require_unchanged(shard)
            urls = ", ".join(shard.url for shard in shards)
            raise DataError(
                redact(
                    f"{urls}: gives other tokens than when the run began, though its size and version "
                    "are the same; shards may not be altered while a run uses them; restore it, or "
                    "start a run with another run.name"
                )
            )
        self._open[number] = found
        if len(self._open) > self.most_open:
            self._open.popitem(last=False)
        return found

    def _pass(self, number: int) -> tuple[int, int]:
        """Return what blocks have in common that are best made in one pass: a shard, or one of its row groups."""
        first = self.blocks[number].parts[0]
        if len(self.blocks[number].parts) == 1:
            if readers.is_sequential(self.shards[first.shard]):
                return first.shard, END
            if first.group != END:
                return first.shard, first.group
        return END, number

    def _together(self, number: int, wanted: Set[int] | None) -> list[int]:
        """Return the blocks that one pass makes: the missing ones of those that are wanted.

        By default those are all blocks of a shard that must be read from its start, but none beside it of a row group,
        which can be had alone: tokenising blocks that other nodes use costs more than reading the group again.
        """
        shard, group = self._pass(number)
        if wanted is None and group != END:
            return [number]
        missing = [
            peer
            for peer in self._passes[shard, group]
            if (wanted is None or peer in wanted)
            and peer not in self._making
            and not self.path(peer).exists()
        ]
        return missing if number in missing else [number]

    def _made(self, numbers: Sequence[int]) -> None:
        with self._lock:
            for number in numbers:
                self._making.pop(number, None)

    def _make(self, numbers: Sequence[int]) -> None:
        """Tokenise blocks; one process of this machine at a time."""
        from filelock import FileLock, Timeout

        lock = FileLock(self.path(numbers[0]).with_suffix(".lock"))
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=LOCK_TIMEOUT_S)
        except (Timeout, NotImplementedError):
            log.warning(
                "%s: its lock can not be had; the block is tokenised without it", lock.lock_file
            )
        try:
            missing = [
                number for number in numbers if not self.path(number).exists()
            ]  # others may have been faster
            if missing:
                task = pack_task(
                    [self.blocks[i] for i in missing],
                    self.shards,
                    [self.path(i) for i in missing],
                    check=self.checksums is None,
                )
                if self._pool is not None:
                    self._pool.run(task)
                else:
                    run_task(self.encoder, task, self._limit_bytes)
        finally:
            lock.release()
            with suppress(OSError):
                Path(lock.lock_file).unlink()
