"""Tokenized blocks on local disk: created once per node, then mapped into memory by its workers.

A cache file is safetensors (tokens, targets, offsets; a checksum in its metadata). Its name is a
hash of everything that decides its content: tokenizer, template, data fields, and for each range
its shard's URL, size and version and where it starts and stops.

Guarantees: a file is written whole or not at all, checked when it is opened, and rebuilt when it is
damaged; one process of a machine builds it while the others wait; the least recently used files are
removed when there are too many. Nothing in the cache is needed to resume: an empty one only costs
time.

n is the number of rows of a block, L the sum of their tokens.
"""

from __future__ import annotations

import errno
import json
import logging
import mmap
import os
import resource
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dist_ft.core import scratch
from dist_ft.core.json_documents import decode_json
from dist_ft.data.batch import IGNORE_INDEX
from dist_ft.data.block import Block
from dist_ft.data.encoding.chat import TEMPLATE_DATE, Encoder
from dist_ft.data.encoding.encoded import EncodedRows
from dist_ft.data.encoding.fast_tokenizer import require_fast
from dist_ft.data.sources.discovery import Shards

FORMAT = 2
"""Version of cached content. Raise it when the same inputs give other tokens, targets or layout."""
MAX_OPEN_FILES = 65536
SUFFIX = ".safetensors"
STALE_S = 3600.0
"""A temporary file that was not written to for this long was left by a killed writer."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenizedBlock:
    """A cached block; `tokens` and `targets` are read from disk on access.

    Attributes:
        tokens: (L,) int32 token ids.
        targets: (L,) uint8: 1 where the token is a target; or int32: the task's label there, or
            `IGNORE_INDEX`.
        offsets: (n + 1,) int64: row i is tokens[offsets[i]:offsets[i + 1]].
        format: chat, instruction, text or tokens; or the name of the task.
        rows_per_range: rows of each shard range.
        bad_rows: what was wrong with rows that were skipped (they have no tokens).
        checksum: checksum of all arrays.
    """

    tokens: np.ndarray
    targets: np.ndarray
    offsets: np.ndarray
    format: str
    rows_per_range: tuple[int, ...]
    bad_rows: tuple[str, ...]
    checksum: str

    @property
    def is_labeled(self) -> bool:
        """Whether targets are labels of a task rather than marks of next-token targets."""
        return self.targets.dtype == np.int32

    @property
    def is_target(self) -> np.ndarray:
        """The positions with a target, bool (L,)."""
        if self.is_labeled:
            return self.targets != IGNORE_INDEX
        return self.targets.astype(bool)


EMPTY_BLOCK = TokenizedBlock(
    tokens=np.zeros(0, np.int32),
    targets=np.zeros(0, np.uint8),
    offsets=np.zeros(1, np.int64),
    format="",
    rows_per_range=(),
    bad_rows=(),
    checksum="0" * 32,
)
"""A block without rows."""


def compute_fingerprint(encoder: Encoder) -> str:
    """Return a hash of everything that decides a row's tokens and targets: 32 hexadecimal digits.

    It does not contain the sequence length, except for tasks that cut rows themselves: other rows
    are cached whole.
    """
    import xxhash

    tokenizer = encoder.tokenizer
    require_fast(tokenizer)
    # The whole backend and not the tokenizer's name: a folder may be overwritten in place.
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    # these are left behind by calls and do not belong to the tokenizer
    backend.update(truncation=None, padding=None)

    data_fields = {"format", "fields", "prompt_template", "system_prompt", "targets", "bad_rows"}
    components: list[Any] = [
        FORMAT,
        backend,
        tokenizer.chat_template,
        tokenizer.special_tokens_map,
        encoder.data.model_dump(include=data_fields),
    ]
    # Components are added only where they matter: the fingerprints of other runs, which are stored
    # in their indexes, must stay as they are.
    if "strftime_now" in str(tokenizer.chat_template):
        components.append(TEMPLATE_DATE.isoformat())
    if encoder.recipe:
        components.append(encoder.recipe)
    # It decides only which rows are skipped.
    if encoder.data.bad_rows == "skip" and not encoder.data.is_default("max_row_mib"):
        components.append(encoder.data.max_row_mib)

    encoded = json.dumps(components, sort_keys=True, default=str).encode()
    return xxhash.xxh3_128_hexdigest(encoded)


def cache_key(encoder_fingerprint: str, block: Block, shards: Shards) -> str:
    """Return the name of a block's cache file, without its suffix."""
    import xxhash

    # URLs and not shard numbers: another run may list the same shard at another place and still use
    # its cached blocks.
    ranges = []
    for shard_range in block.ranges:
        shard = shards[shard_range.shard]
        identity = (shard.url, shard.size, shard.version, shard_range.start, shard_range.stop)
        ranges.append(identity)
    return xxhash.xxh3_128_hexdigest(json.dumps([encoder_fingerprint, ranges]).encode())


def write_block(path: Path, encoded: EncodedRows, limit_bytes: float = float("inf")) -> None:
    """Write a cache file to a temporary name and rename it.

    Other blocks are evicted first if the cache would exceed `limit_bytes`, or all of them if the
    disk is full.

    Raises:
        OSError: the file cannot be written, even after all other blocks were removed.
    """
    from safetensors.numpy import save

    arrays = {"offsets": encoded.offsets, "tokens": encoded.tokens, "targets": encoded.targets}
    metadata = {
        "format": encoded.format,
        "part_rows": json.dumps(encoded.rows_per_range),
        "bad_rows": json.dumps(encoded.bad_rows),
    }

    checksum = compute_checksum(arrays, metadata)
    body = save(arrays, metadata={**metadata, "checksum": checksum})

    evict(path.parent, limit_bytes - len(body))
    try:
        _write_atomically(path, body)
    except OSError as error:
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        if not is_full or not evict(path.parent, 0):
            raise
        _write_atomically(path, body)


def _write_atomically(path: Path, body: bytes) -> None:
    # In the same folder, as a rename is atomic only within one file system.
    with scratch.new_file(path) as temporary:
        # Not forced to disk: the checksum reveals a torn file, which is then rebuilt.
        temporary.file.write(body)
        temporary.file.flush()
        os.replace(temporary.path, path)


def evict(folder: Path, limit_bytes: float) -> int:
    """Remove least recently used blocks until the rest holds at most `limit_bytes`.

    A block that a process has mapped stays readable to it. Files that killed writers left behind
    are removed too.

    Returns:
        The number of removed blocks.
    """
    if limit_bytes == float("inf"):
        return 0

    blocks = []  # (time of last use, bytes, path)
    for entry in os.scandir(folder):
        try:
            status = entry.stat()
        except FileNotFoundError:
            continue  # another process evicts at the same time

        # By age: files of version 0.1.0, and those on a disk without locks.
        is_stale = status.st_mtime < time.time() - STALE_S
        if entry.name.endswith(SUFFIX):
            blocks.append((status.st_mtime, status.st_size, entry.path))
        elif scratch.NEW_FILE in entry.name and is_stale:
            Path(entry.path).unlink(missing_ok=True)
        elif f"{SUFFIX}{scratch.NEW_FILE}" in entry.name or entry.name.endswith(".lock"):
            scratch.remove_abandoned(Path(entry.path))

    # `load_block` sets the time of a file that it opens, so the order is that of last use.
    total_bytes = sum(size for _, size, _ in blocks)
    num_removed = 0
    for _, size, path in sorted(blocks):
        if total_bytes <= limit_bytes:
            break
        Path(path).unlink(missing_ok=True)
        total_bytes -= size
        num_removed += 1

    return num_removed


def max_open_blocks(requested: int) -> int:
    """Return how many blocks a store may hold open.

    That is `requested`, but at most a quarter of the files this process may open, as each block
    costs a file descriptor. The soft limit is raised as far as the hard one allows, up to
    `MAX_OPEN_FILES`.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    hard_as_set = hard

    # RLIM_INFINITY is -1 on some systems, so it cannot be compared with other limits
    if soft == resource.RLIM_INFINITY:
        soft = MAX_OPEN_FILES
    if hard == resource.RLIM_INFINITY:
        hard = MAX_OPEN_FILES

    if soft < min(hard, MAX_OPEN_FILES):
        soft = min(hard, MAX_OPEN_FILES)
        # the hard limit stays as it was: once lowered, a process cannot raise it again
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard_as_set))

    return min(requested, max(1, soft // 4))


def load_block(path: Path, check: bool = True) -> TokenizedBlock | None:
    """Map a cache file; return None if there is none, or if it is damaged (it is then removed)."""
    try:
        block = read_block(path, check)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError) as error:
        log.warning("%s: the cached block is damaged (%s); it is rebuilt", path, error)
        path.unlink(missing_ok=True)
        return None

    # Mark it as used, for `evict`; not possible for another user's file or a read-only disk.
    with suppress(OSError):
        os.utime(path)
    return block


def read_block(path: Path, check: bool = True) -> TokenizedBlock:
    """Map a cache file into memory; `check` compares its checksum, which reads all of it.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError, KeyError, TypeError: it is damaged.
    """
    # Mapped and parsed here, as safetensors' own reader copies each tensor into memory.
    with open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    # the format: 8 bytes with the length of the header, the header as JSON, the tensors
    start = 8 + int.from_bytes(mapped[:8], "little")
    if start > len(mapped):
        raise ValueError("the header is cut off")
    header = decode_json(mapped[8:start])

    dtypes = {"offsets": "<i8", "tokens": "<i4", "targets": "u1"}
    if header["targets"]["dtype"] == "I32":
        dtypes["targets"] = "<i4"

    arrays = {}
    for name, dtype in dtypes.items():
        arrays[name] = _map_array(mapped, start, header[name], dtype)

    metadata = dict(header["__metadata__"])
    checksum = metadata.pop("checksum")
    if check and compute_checksum(arrays, metadata) != checksum:
        raise ValueError("the checksum differs")

    return TokenizedBlock(
        tokens=arrays["tokens"],
        targets=arrays["targets"],
        offsets=arrays["offsets"],
        format=metadata["format"],
        rows_per_range=tuple(decode_json(metadata["part_rows"])),
        bad_rows=tuple(decode_json(metadata["bad_rows"])),
        checksum=checksum,
    )


def _map_array(mapped: mmap.mmap, start: int, entry: dict[str, Any], dtype: str) -> np.ndarray:
    """Return a tensor of a safetensors file as a view of the mapping, which starts at `start`."""
    first, last = entry["data_offsets"]
    are_integers = type(first) is int and type(last) is int
    if not are_integers or not 0 <= first <= last <= len(mapped) - start:
        raise ValueError("an array is outside the file")

    count = (last - first) // np.dtype(dtype).itemsize
    if not count:
        return np.empty(0, dtype)
    return np.frombuffer(mapped, dtype=dtype, count=count, offset=start + first)


def compute_checksum(arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> str:
    """Return the checksum of a block's arrays and metadata."""
    import xxhash

    # a fixed order of keys and arrays: indexes store this checksum for the whole run
    digest = xxhash.xxh3_128(json.dumps(metadata, sort_keys=True).encode())
    for name in ("offsets", "tokens", "targets"):
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()
