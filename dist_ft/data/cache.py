"""Tokenised shards on local disk: made once, then mapped into memory.

A cache file is safetensors (tokens, targets, offsets; a checksum in its metadata) under a key of everything that
decides its content: tokenizer, template, data fields, shard URL, size and version. Guarantees: written whole or not at
all, checked when opened, rebuilt when damaged, built by one process of a machine while the others wait. Nothing in it
is needed to resume: an empty cache only costs time. Does not evict.
"""

from __future__ import annotations

import json
import logging
import mmap
import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from dist_ft.config.schema import DataSection
from dist_ft.data.source import Shard, read_rows
from dist_ft.data.template import Encoded, Encoder, require_fast
from dist_ft.errors import StorageError
from dist_ft.world import World

FORMAT = 1
"""Version of cached content; raised when the same inputs give other tokens, targets or layout."""
OPEN_SHARDS = 512  # each holds a file descriptor
LOCK_TIMEOUT_S = 600.0

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenisedShard:
    """A cached shard; `tokens` and `targets` are read from disk as they are touched.

    Attributes:
        tokens: (sum,) int32 token ids.
        targets: (sum,) uint8: 1 where the token is learned.
        offsets: (n + 1,) int64: row i is tokens[offsets[i]:offsets[i + 1]].
        format: chat, instruction or text.
    """

    tokens: np.ndarray
    targets: np.ndarray
    offsets: np.ndarray
    format: str


def fingerprint(tokenizer: Any, data: DataSection) -> str:
    """Return a hash of all that decides tokens and targets of a row: 32 hexadecimal digits.

    The sequence length is not part of it: samples are cached whole and cut later.
    """
    import xxhash

    require_fast(tokenizer)
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend.update(truncation=None, padding=None)  # state left by calls, not a property of the tokenizer
    chosen = data.model_dump(include={"format", "fields", "prompt_template", "targets"})
    parts = [FORMAT, backend, tokenizer.chat_template, tokenizer.special_tokens_map, chosen]
    return xxhash.xxh3_128_hexdigest(json.dumps(parts, sort_keys=True, default=str).encode())


class TokenCache:
    """The tokenised shards of one encoder, in a local folder."""

    def __init__(self, folder: str | Path, encoder: Encoder, encoder_fingerprint: str | None = None) -> None:
        """Nothing is read or written before the first shard is asked for; only the fingerprint is computed."""
        self.folder = Path(folder)
        self.encoder = encoder
        self.fingerprint = encoder_fingerprint or fingerprint(encoder.tokenizer, encoder.data)
        self._open: OrderedDict[Shard, TokenisedShard] = OrderedDict()
        self._checked: set[Shard] = set()
        self._lock = Lock()

    def shard(self, shard: Shard) -> TokenisedShard:
        """Return a shard's tokens: from memory, from disk, or else read and tokenised now. Safe over threads.

        Raises:
            DataError: the shard vanished or changed, or holds a row that can not be used.
        """
        with self._lock:
            if shard in self._open:
                self._open.move_to_end(shard)
                return self._open[shard]
            try:
                found = self._load(shard) or self._build(shard)
            except OSError as error:
                raise StorageError(f"data.cache_dir={self.folder}: can not be used ({error}); a local folder with room "
                                   "for 5 bytes a token is needed; name another") from error
            self._checked.add(shard)
            self._open[shard] = found
            if len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)
            return found

    def prepare(self, shards: Sequence[Shard], world: World) -> None:
        """Have every shard tokenised on this machine, its ranks sharing the work; others may be still at it.

        Worth a call before the first step on a machine with an empty cache: otherwise each shard is made when a
        sample of it is first needed.
        """
        for number in range(world.local_rank, len(shards), world.local_size):
            self.shard(shards[number])

    def path(self, shard: Shard) -> Path:
        """Return the cache file of a shard, there or not."""
        import xxhash

        key = json.dumps([self.fingerprint, shard.url, shard.size, shard.version])
        return self.folder / f"{xxhash.xxh3_128_hexdigest(key.encode())}.safetensors"

    def _load(self, shard: Shard) -> TokenisedShard | None:
        """Open a cache file; None if there is none or it is damaged."""
        path = self.path(shard)
        try:
            return read_shard(path, check=shard not in self._checked)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, KeyError, TypeError) as error:
            log.warning("%s: the cached shard is damaged (%s); it is made again", path, error)
            path.unlink(missing_ok=True)
            return None

    def _build(self, shard: Shard) -> TokenisedShard:
        """Tokenise a shard and store it; one process of this machine at a time."""
        from filelock import FileLock, Timeout

        path = self.path(shard)
        lock = FileLock(path.with_suffix(".lock"))
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=LOCK_TIMEOUT_S)
        except (Timeout, NotImplementedError):
            log.warning("%s: its lock can not be had; the shard is tokenised without it", path)
        try:
            found = self._load(shard)  # another process may have been faster
            if found is None:
                write_shard(path, self.encoder.encode(read_rows(shard), shard.url))
                found = read_shard(path)
            return found
        finally:
            lock.release()


def write_shard(path: Path, encoded: Encoded) -> None:
    """Write a cache file beside its place and rename it there."""
    from safetensors.numpy import save

    arrays = {"offsets": encoded.offsets, "tokens": encoded.tokens, "targets": encoded.targets}
    body = save(arrays, metadata={"format": encoded.format, "checksum": _checksum(arrays, encoded.format)})
    temporary = path.with_suffix(f".tmp-{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(body)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_shard(path: Path, check: bool = True) -> TokenisedShard:
    """Map a cache file into memory, and with `check` compare its checksum (which reads it all).

    Raises:
        FileNotFoundError: there is none.
        ValueError, KeyError, TypeError: it is damaged.
    """
    with open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    start = 8 + int.from_bytes(mapped[:8], "little")
    if start > len(mapped):
        raise ValueError("the header is cut off")
    header = json.loads(mapped[8:start])
    arrays = {name: _view(mapped, start, header[name], dtype)
              for name, dtype in (("offsets", "<i8"), ("tokens", "<i4"), ("targets", "u1"))}
    about = header["__metadata__"]
    if check and _checksum(arrays, about["format"]) != about["checksum"]:
        raise ValueError("the checksum differs")
    return TokenisedShard(arrays["tokens"], arrays["targets"], arrays["offsets"], about["format"])


def _view(mapped: mmap.mmap, start: int, entry: dict[str, Any], dtype: str) -> np.ndarray:
    """Return a tensor of a safetensors file as a view of the mapping."""
    begin, end = entry["data_offsets"]
    count = (end - begin) // np.dtype(dtype).itemsize
    return np.frombuffer(mapped, dtype=dtype, count=count, offset=start + begin) if count else np.empty(0, dtype)


def _checksum(arrays: dict[str, np.ndarray], kind: str) -> str:
    import xxhash

    digest = xxhash.xxh3_128(kind.encode())
    for name in ("offsets", "tokens", "targets"):
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()
