"""Tokenised blocks on local disk: made once a node, then mapped into memory by all its workers.

A cache file is safetensors (tokens, targets, offsets; a checksum in its metadata) under a key of everything that
decides its content: tokenizer, template, data fields, and for each part its shard's URL, size and version and where it
is cut. Guarantees: written whole or not at all, checked when opened, rebuilt when damaged, built by one process of a
machine while the others wait; what was used least goes when there is too much. Nothing in it is needed to resume: an
empty cache only costs time.
"""

from __future__ import annotations

import errno
import json
import logging
import mmap
import os
import resource
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dist_ft.data.batch import IGNORED
from dist_ft.data.block import Block
from dist_ft.data.encoding.chat import (
    DATE,
    Encoder,
)
from dist_ft.data.encoding.encoded import (
    Encoded,
)
from dist_ft.data.encoding.fast_tokenizer import require_fast
from dist_ft.data.sources.discovery import Shard

FORMAT = 2
"""Version of cached content; raised when the same inputs give other tokens, targets or layout."""
MOST_FILES = 65536
TEMPORARY, STALE_S = ".tmp-", 3600.0
"""In the names of files being written; one not written to for so long was left by a writer that is no more."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenisedBlock:
    """A cached block; `tokens` and `targets` are read from disk as they are touched.

    Attributes:
        tokens: (sum,) int32 token ids.
        targets: (sum,) uint8: 1 where the token is learned; or int32: what the task wants there, or `IGNORED`.
        offsets: (n + 1,) int64: row i is tokens[offsets[i]:offsets[i + 1]].
        format: chat, instruction, text or tokens; or the name of the task.
        part_rows: rows of each part.
        bad_rows: what was wrong with rows that were skipped (they have no tokens).
        checksum: of all arrays.
    """

    tokens: np.ndarray
    targets: np.ndarray
    offsets: np.ndarray
    format: str
    part_rows: tuple[int, ...]
    bad_rows: tuple[str, ...]
    checksum: str

    @property
    def is_labelled(self) -> bool:
        """Tell whether targets are labels of a task, not marks of tokens to be told from those before."""
        return self.targets.dtype == np.int32

    @property
    def learned(self) -> np.ndarray:
        """Return bool (sum,): where something is learned."""
        return self.targets != IGNORED if self.is_labelled else self.targets.astype(bool)


def fingerprint(encoder: Encoder) -> str:
    """Return a hash of all that decides tokens and targets of a row: 32 hexadecimal digits.

    The sequence length is no part of it, except for tasks that cut rows themselves: others are cached whole.
    """
    import xxhash

    tokenizer, data = encoder.tokenizer, encoder.data
    require_fast(tokenizer)
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend.update(
        truncation=None, padding=None
    )  # state left by calls, not a property of the tokenizer
    chosen = data.model_dump(
        include={"format", "fields", "prompt_template", "system_prompt", "targets", "bad_rows"}
    )
    dates = [DATE.isoformat()] if "strftime_now" in str(tokenizer.chat_template) else []
    parts = [
        FORMAT,
        backend,
        tokenizer.chat_template,
        tokenizer.special_tokens_map,
        chosen,
        *dates,
        *([encoder.recipe] if encoder.recipe else []),
    ]
    return xxhash.xxh3_128_hexdigest(json.dumps(parts, sort_keys=True, default=str).encode())


def key(encoder_fingerprint: str, block: Block, shards: Sequence[Shard]) -> str:
    """Return the name of a block's cache file, without suffix."""
    import xxhash

    parts = [
        (
            shards[part.shard].url,
            shards[part.shard].size,
            shards[part.shard].version,
            part.start,
            part.stop,
        )
        for part in block.parts
    ]
    return xxhash.xxh3_128_hexdigest(json.dumps([encoder_fingerprint, parts]).encode())


def write_block(path: Path, encoded: Encoded, limit_bytes: float = float("inf")) -> None:
    """Write a cache file beside its place and rename it there; make room first where there is too much or too little.

    Raises:
        OSError: it can not be written, even after all other blocks were removed.
    """
    from safetensors.numpy import save

    arrays = {"offsets": encoded.offsets, "tokens": encoded.tokens, "targets": encoded.targets}
    about = {
        "format": encoded.format,
        "part_rows": json.dumps(encoded.part_rows),
        "bad_rows": json.dumps(encoded.bad_rows),
    }
    body = save(arrays, metadata={**about, "checksum": checksum(arrays, about)})
    evict(path.parent, limit_bytes - len(body))
    try:
        _place(path, body)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not evict(path.parent, 0):
            raise
        _place(path, body)


def _place(path: Path, body: bytes) -> None:
    temporary = path.with_suffix(f"{TEMPORARY}{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(
                body
            )  # not forced to disk: a torn file shows by its checksum, and is made again
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def evict(folder: Path, limit_bytes: float) -> int:
    """Remove least recently used blocks until the others hold at most `limit_bytes`; return how many went.

    A block that a process has mapped stays readable to it. What killed writers left goes too.
    """
    if limit_bytes == float("inf"):
        return 0
    found = []
    for item in os.scandir(folder):
        try:
            about = item.stat()
        except FileNotFoundError:
            continue
        if item.name.endswith(".safetensors"):
            found.append((about.st_mtime, about.st_size, item.path))
        elif TEMPORARY in item.name and about.st_mtime < time.time() - STALE_S:
            Path(item.path).unlink(missing_ok=True)
    total, removed = sum(size for _, size, _ in found), 0
    for _, size, path in sorted(found):
        if total <= limit_bytes:
            break
        Path(path).unlink(missing_ok=True)
        total, removed = total - size, removed + 1
    return removed


def most_open(wanted: int) -> int:
    """Return how many blocks a store may hold open: `wanted`, or a quarter of the files this process may open.

    Each costs a file descriptor. The soft limit is raised as far as the hard one allows, to `MOST_FILES` at most.
    """
    soft, hard = (
        MOST_FILES if limit == resource.RLIM_INFINITY else limit
        for limit in resource.getrlimit(resource.RLIMIT_NOFILE)
    )
    if soft < min(hard, MOST_FILES):
        soft = min(hard, MOST_FILES)
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (soft, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
        )
    return min(wanted, max(1, soft // 4))


def load_block(path: Path, check: bool = True) -> TokenisedBlock | None:
    """Map a cache file; None if there is none, or it is damaged (it is then removed)."""
    try:
        found = read_block(path, check)
        with suppress(OSError):  # of another user, or on a file system that is read only
            os.utime(path)  # for `evict`
        return found
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError) as error:
        log.warning("%s: the cached block is damaged (%s); it is made again", path, error)
        path.unlink(missing_ok=True)
        return None


def read_block(path: Path, check: bool = True) -> TokenisedBlock:
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
    arrays = {
        name: _view(mapped, start, header[name], dtype)
        for name, dtype in (
            ("offsets", "<i8"),
            ("tokens", "<i4"),
            ("targets", "<i4" if header["targets"]["dtype"] == "I32" else "u1"),
        )
    }
    about = dict(header["__metadata__"])
    stored = about.pop("checksum")
    if check and checksum(arrays, about) != stored:
        raise ValueError("the checksum differs")
    return TokenisedBlock(
        arrays["tokens"],
        arrays["targets"],
        arrays["offsets"],
        about["format"],
        tuple(json.loads(about["part_rows"])),
        tuple(json.loads(about["bad_rows"])),
        stored,
    )


def _view(mapped: mmap.mmap, start: int, entry: dict[str, Any], dtype: str) -> np.ndarray:
    """Return a tensor of a safetensors file as a view of the mapping."""
    begin, end = entry["data_offsets"]
    count = (end - begin) // np.dtype(dtype).itemsize
    return (
        np.frombuffer(mapped, dtype=dtype, count=count, offset=start + begin)
        if count
        else np.empty(0, dtype)
    )


def checksum(arrays: dict[str, np.ndarray], about: dict[str, str]) -> str:
    """Return the checksum of a block: of its arrays, and of what is said about them."""
    import xxhash

    digest = xxhash.xxh3_128(json.dumps(about, sort_keys=True).encode())
    for name in ("offsets", "tokens", "targets"):
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()
