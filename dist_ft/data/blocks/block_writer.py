"""Tokenizes blocks into the local cache: here or in the tokenizer processes, once per machine."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from dist_ft.core.errors import StorageError
from dist_ft.data.block import Block
from dist_ft.data.blocks import token_cache
from dist_ft.data.blocks.tokenize_blocks import create_task, run_task
from dist_ft.data.blocks.tokenizer_pool import TokenizerPool
from dist_ft.data.encoding.chat import Encoder
from dist_ft.data.sources.discovery import Shards
from dist_ft.storage import local_files

LOCK_TIMEOUT_S = 1800.0

log = logging.getLogger(__name__)


class BlockWriter:
    """Writes cache files.

    Attributes:
        folder: folder of the local cache.
        encoder: rows to tokens.
        shards: shards of all sources.
        fingerprint: fingerprint of the encoder.
    """

    def __init__(
        self,
        folder: str | Path,
        encoder: Encoder,
        shards: Shards,
        limit_bytes: float = float("inf"),
    ) -> None:
        """Store the settings and compute the fingerprint of the encoder.

        Args:
            folder: folder of the local cache.
            encoder: rows to tokens.
            shards: shards of all sources.
            limit_bytes: limit of the cache.
        """
        self.folder = Path(folder)
        self.encoder = encoder
        self.shards = shards
        self.fingerprint = token_cache.compute_fingerprint(encoder)
        self._limit_bytes = limit_bytes

    def path(self, block: Block) -> Path:
        """Return the path of a block's cache file, which need not exist."""
        key = token_cache.cache_key(self.fingerprint, block, self.shards)
        return self.folder / f"{key}{token_cache.SUFFIX}"

    def write(self, blocks: Sequence[Block], check: bool, pool: TokenizerPool | None) -> None:
        """Tokenize the blocks that are missing; one process of this machine at a time.

        Args:
            blocks: blocks of one pass over their shards.
            check: whether shards must be as they were when they were listed.
            pool: processes that tokenize; None: this process does.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with _lock(self.path(blocks[0]).with_suffix(".lock")):
            # another process may have written them while this one waited for the lock
            missing = [block for block in blocks if not self.path(block).exists()]
            if not missing:
                return

            paths = [self.path(block) for block in missing]
            task = create_task(missing, self.shards, paths, check)
            if pool is not None:
                pool.run(task)
            else:
                run_task(self.encoder, task, self._limit_bytes)


def unusable_cache(folder: Path, error: OSError) -> StorageError:
    """Return the error for a cache that cannot be read or written."""
    return StorageError(
        f"data.cache_dir={folder}: cannot be used ({error}). It must be a local folder with room "
        "for 5 bytes per token. Set another folder."
    )


def evicted_at_once() -> StorageError:
    """Return the error for a cache that does not keep what is in use."""
    return StorageError(
        "data.cache_gib: blocks are evicted as soon as they are written. It must be large enough "
        "for the blocks in use. Raise it."
    )


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    from filelock import Timeout

    lock = local_files.file_lock(str(path))
    try:
        lock.acquire(timeout=LOCK_TIMEOUT_S)
    except (Timeout, NotImplementedError):
        # A network disk without locks, or a holder that hangs. Two processes may then tokenize the
        # same block: a waste, but each writes the same content in one step.
        log.warning("%s: the lock cannot be acquired; the block is tokenized without it", path)

    try:
        yield
    finally:
        lock.release()
        with suppress(OSError):
            path.unlink()
