"""The manifest lists the contents of a checkpoint. A checkpoint exists if its manifest exists.

Parsing rejects hostile and truncated manifests: paths outside the folder, absurd sizes, unknown
versions. This module does not access storage.
"""

from __future__ import annotations

import base64
import re
import zlib
from typing import Annotated, Any, NamedTuple

import numpy as np
import pydantic
import xxhash
from pydantic import BaseModel, ConfigDict, Field

from dist_ft.core.errors import CheckpointError
from dist_ft.core.json_documents import decode_json

FORMAT_VERSION = 3
"""Version 1 has no files shared by several checkpoints, version 2 no cursors. Older releases read
what they know."""
NAME = "manifest.json"
BLOCK_BYTES = 2**21
"""The smallest range of a file that can be verified.

Each block takes 16 characters in the manifest.
"""
_CHECKSUM_FIELD, _END = b',\n "checksum": "', b"\n}"
_CHECKSUM_PREFIX = "xxh3_128:"
_BLOCK_DIGITS = 16
CURSOR_VALUES = 6
MAX_CURSOR_BYTES = 2**28
_FOLDER = re.compile(r"step-([0-9]{9,})-a([0-9]{4,})")


class DamagedError(CheckpointError):
    """The checkpoint differs from what was written: truncated or altered.

    The one before it is loaded instead.
    """


class NewerFormatError(CheckpointError):
    """The checkpoint was written by a newer dist_ft. It is valid and must not be skipped."""


def _require_relative(path: str) -> str:
    """Return `path`; raises ValueError if it could lead out of a folder."""
    parts = path.split("/")
    has_bad_part = any(part in ("", ".", "..") for part in parts)

    # A colon ends a drive letter or the protocol of a URL.
    if path.startswith("/") or "\\" in path or ":" in path or has_bad_part:
        raise ValueError(f"the path {path!r} leads out of the checkpoint")
    return path


RelativePath = Annotated[str, pydantic.AfterValidator(_require_relative)]


class _FrozenModel(BaseModel):
    # Unknown fields are ignored, so that a release can add some without a new format version. JSON
    # has no NaN and infinity, and a loss may be one of them.
    model_config = ConfigDict(frozen=True, extra="ignore", ser_json_inf_nan="strings")


class FileEntry(_FrozenModel):
    """One file of a checkpoint.

    Attributes:
        path: relative to the checkpoint's folder (for the ledger, to the run's folder).
        num_bytes: length of the file.
        checksum: checksum of the whole file.
        block_bytes: bytes per block checksum; 0 if only the whole file has a checksum.
        blocks: the xxh3_64 checksums of all blocks, concatenated.
        shared: whether several checkpoints refer to the file; such files are in a folder of the
            run.
    """

    path: RelativePath
    num_bytes: int = Field(ge=0, lt=2**50)
    checksum: str = Field(pattern=r"^xxh3_128:[0-9a-f]{32}$")
    block_bytes: int = Field(0, ge=0, lt=2**50)
    blocks: str = Field("", pattern=r"^[0-9a-f]*$")
    shared: bool = False

    @pydantic.model_validator(mode="after")
    def _require_all_blocks(self) -> FileEntry:
        num_blocks = 0
        if self.block_bytes:
            num_blocks = -(-self.num_bytes // self.block_bytes)

        if len(self.blocks) != _BLOCK_DIGITS * num_blocks:
            raise ValueError(
                f"{self.path}: {len(self.blocks)} characters of block checksums do not fit its "
                "length"
            )
        return self


Dimension = Annotated[int, Field(ge=0, lt=2**50)]
"""Elements of a tensor along one axis."""


class TensorInfo(_FrozenModel):
    """The full (unsharded) shape of one tensor of the model."""

    shape: tuple[Dimension, ...]


class LedgerEntry(_FrozenModel):
    """One segment of the ledger: the samples of steps [start, stop)."""

    start: int = Field(ge=0)
    stop: int = Field(ge=0)
    file: FileEntry


class Progress(_FrozenModel):
    """The progress of a run. The data position and the learning rate are functions of `step`.

    Attributes:
        step: number of training steps done.
        optimizer_step: number of updates that the optimizer has counted.
        num_tokens: tokens processed, without padding.
        num_target_tokens: target tokens processed.
        history: (loss, gradient norm) of the last normal steps, which anomaly detection compares
            with.
        trained_s: seconds spent in training steps.
        num_bad_rows: rows of a stream that could not be used.
    """

    step: int = Field(ge=0)
    optimizer_step: int = Field(ge=0)
    num_tokens: int = 0
    num_target_tokens: int = 0
    history: tuple[tuple[float, float], ...] = ()
    trained_s: float = 0.0
    num_bad_rows: int = 0


class Manifest(_FrozenModel):
    """The description of a checkpoint.

    Attributes:
        evaluation: held-out losses "before" and "after" the run; also "loss" and all metrics if
            this step was evaluated.
        frozen: names of the weights in the shared files; they are not trained and were written
            once.
        cursors: where the lanes are in streamed data (`pack_cursors`); "" if it is indexed.
        layout: engine, ZeRO stage and number of workers that wrote a local checkpoint; "" in
            storage.
    """

    format_version: int
    run: str
    attempt: int = Field(ge=0)
    world_size: int = Field(ge=1)
    engine: str
    progress: Progress
    tensors: dict[str, TensorInfo]
    aliases: dict[str, str]
    files: tuple[FileEntry, ...]
    ledger: tuple[LedgerEntry, ...] = ()
    frozen: tuple[str, ...] = ()
    evaluation: dict[str, float] = Field(default_factory=dict)
    cursors: str = ""
    layout: str = ""
    created_at: str = ""
    versions: dict[str, str] = Field(default_factory=dict)

    @property
    def folder_name(self) -> str:
        """The name of the checkpoint's folder."""
        return folder_name(self.progress.step, self.attempt)


def no_cursors() -> np.ndarray:
    """Return the cursors of indexed data: none, int64 (0, 6)."""
    return np.zeros((0, CURSOR_VALUES), dtype=np.int64)


def pack_cursors(cursors: np.ndarray) -> str:
    """Return cursors, int64 (n, 6), as text; none of them as ""."""
    if not len(cursors):
        return ""
    in_order = cursors[np.lexsort((cursors[:, 1], cursors[:, 0]))]
    content = np.ascontiguousarray(in_order.T, dtype="<i8").tobytes()
    return base64.b64encode(zlib.compress(content)).decode()


def cursors_of(manifest: Manifest | None) -> np.ndarray:
    """Return the cursors of a checkpoint, int64 (n, 6); without a checkpoint none."""
    if manifest is None or not manifest.cursors:
        return no_cursors()
    return unpack_cursors(manifest.cursors, manifest.folder_name)


def unpack_cursors(text: str, where: str) -> np.ndarray:
    """Return the cursors that `pack_cursors` packed, int64 (n, 6).

    `where`: name of the checkpoint, for errors.

    Raises:
        DamagedError: `text` holds no cursors.
    """
    try:
        # Before memory of any size is taken: a manifest may come from somebody else.
        unpacker = zlib.decompressobj()
        content = unpacker.decompress(base64.b64decode(text, validate=True), MAX_CURSOR_BYTES)
        return np.frombuffer(content, dtype="<i8").reshape(CURSOR_VALUES, -1).T.copy()
    except (ValueError, zlib.error) as error:
        raise DamagedError(f"{where}: holds no valid cursors ({error})") from error


def compute_checksum(content: bytes | memoryview) -> str:
    """Return the checksum used in manifests. It detects damage; it is not a signature."""
    return f"{_CHECKSUM_PREFIX}{xxhash.xxh3_128_hexdigest(content)}"


def file_entry(path: str, content: bytes | memoryview) -> FileEntry:
    """Return the manifest entry of a file that is always read whole."""
    return FileEntry(path=path, num_bytes=len(content), checksum=compute_checksum(content))


def file_entry_in_blocks(path: str, *buffers: memoryview) -> FileEntry:
    """Return the manifest entry, with block checksums, of a file of `buffers` (of bytes)."""
    whole = xxhash.xxh3_128()
    block = xxhash.xxh3_64()
    digests = []
    left_in_block = BLOCK_BYTES

    # Blocks are those of the file, wherever one buffer ends and the next starts. Both checksums are
    # computed in one pass, while a chunk is in the processor's cache.
    for buffer in buffers:
        rest = buffer
        while len(rest):
            chunk = rest[:left_in_block]
            rest = rest[left_in_block:]
            whole.update(chunk)
            block.update(chunk)
            left_in_block -= len(chunk)

            if not left_in_block:
                digests.append(block.hexdigest())
                block = xxhash.xxh3_64()
                left_in_block = BLOCK_BYTES

    # The last block, unless the file ends with a whole one.
    if left_in_block < BLOCK_BYTES:
        digests.append(block.hexdigest())

    return FileEntry(
        path=path,
        num_bytes=sum(map(len, buffers)),
        checksum=f"{_CHECKSUM_PREFIX}{whole.hexdigest()}",
        block_bytes=BLOCK_BYTES,
        blocks="".join(digests),
    )


def matches_checksum(entry: FileEntry, start: int, content: memoryview) -> bool:
    """Whether `content`, whole blocks from byte `start` of the file, has its checksums."""
    if not entry.block_bytes:
        return len(content) == entry.num_bytes and compute_checksum(content) == entry.checksum

    digests = ""
    for offset in range(0, len(content), entry.block_bytes):
        digests += xxhash.xxh3_64_hexdigest(content[offset : offset + entry.block_bytes])

    # By position, so that bytes of another place in the file do not match.
    first = start // entry.block_bytes * _BLOCK_DIGITS
    return entry.blocks[first : first + len(digests)] == digests


def serialize_manifest(manifest: Manifest) -> bytes:
    """Return the manifest file: JSON whose last field is the checksum of everything before it."""
    body = manifest.model_dump_json(indent=1).encode()
    digest = compute_checksum(body).encode()

    # Put in before the closing brace, so that the file is valid JSON for other tools.
    return body.removesuffix(_END) + _CHECKSUM_FIELD + digest + b'"' + _END


def parse_manifest(content: bytes, where: str) -> Manifest:
    """Return the manifest in `content`.

    Args:
        content: the manifest file.
        where: its URL, for error messages.

    Raises:
        DamagedError: the manifest is truncated, altered or invalid.
        NewerFormatError: it was written by a newer dist_ft.
    """
    body, _, ending = content.rpartition(_CHECKSUM_FIELD)
    is_intact = ending == compute_checksum(body + _END).encode() + b'"' + _END
    has_checksum = bool(body) and ending.startswith(_CHECKSUM_PREFIX.encode())

    # What a newer version writes may have other fields, or another checksum, and is not damaged
    # because of that. The run must not go back to a checkpoint before it.
    newer = _newer_version(content)
    if newer and (is_intact or not has_checksum):
        raise NewerFormatError(
            f"{where}: format_version={newer} is newer than this dist_ft supports "
            f"({FORMAT_VERSION}). Update dist_ft."
        )

    # Before anything else: nothing in a file with a wrong checksum can be relied on.
    if not is_intact:
        raise DamagedError(
            f"{where}: truncated or altered since it was written (its checksum differs); it will "
            "not be loaded"
        )

    try:
        return Manifest.model_validate_json(content)
    except pydantic.ValidationError as error:
        first: Any = error.errors()[0]
        location = ".".join(str(part) for part in first["loc"])
        raise DamagedError(
            f"{where}: not a valid manifest ({location}: {first['msg']}); it will not be loaded"
        ) from error


def _newer_version(content: bytes) -> int:
    """Return the format version of a manifest if it is newer than this dist_ft supports, else 0."""
    try:
        document = decode_json(content)
    except ValueError:
        return 0

    version = document.get("format_version") if isinstance(document, dict) else None
    if type(version) is not int or version <= FORMAT_VERSION:
        return 0
    return version


class CheckpointName(NamedTuple):
    """What the name of a checkpoint's folder encodes."""

    step: int
    attempt: int


def folder_name(step: int, attempt: int) -> str:
    """Return the name of a checkpoint's folder.

    Attempts never share one, so a late writer damages nothing.
    """
    return f"step-{step:09d}-a{attempt:04d}"


def parse_folder(name: str) -> CheckpointName | None:
    """Return the step and attempt of a checkpoint's folder, or None if `name` is not one."""
    match = _FOLDER.fullmatch(name)
    if match is None:
        return None

    # One name per checkpoint: with more leading zeros, a copy would be a second name for it.
    parsed = CheckpointName(int(match[1]), int(match[2]))
    if folder_name(*parsed) != name:
        return None
    return parsed


def require_same_tensors(
    saved: dict[str, TensorInfo], expected: dict[str, TensorInfo], where: str
) -> None:
    """Raise CheckpointError for the first weight whose shape differs from the model's.

    Args:
        saved: shapes in the checkpoint, by weight.
        expected: shapes in the model, by weight.
        where: the checkpoint's URL, for error messages.
    """

    def describe(tensors: dict[str, TensorInfo], name: str) -> str:
        if name not in tensors:
            return "absent"
        return str(list(tensors[name].shape))

    # Weights that only one of them has differ too.
    for name in sorted(saved.keys() | expected.keys()):
        in_checkpoint = describe(saved, name)
        in_model = describe(expected, name)
        if in_checkpoint != in_model:
            raise CheckpointError(
                f"{where}: {name} is {in_checkpoint} in the checkpoint and {in_model} in the "
                "model. Both must be the same. Check model.path."
            )
