"""The manifest: what a checkpoint is made of. A checkpoint exists when its manifest does.

Pure: parsing refuses everything a hostile or torn manifest could do (paths out of the folder, absurd sizes, unknown
versions), and nothing here touches storage.
"""

from __future__ import annotations

import re
from typing import Annotated, Any

import pydantic
import xxhash
from pydantic import BaseModel, ConfigDict, Field

from dist_ft.core.errors import CheckpointError

FORMAT_VERSION = 2
"""1: what dist_ft before files that checkpoints share reads too."""
_SEAL, _END = b',\n "checksum": "', b"\n}"
_KIND, _DIGITS = "xxh3_128:", 16
_FOLDER = re.compile(r"step-([0-9]{9,})-a([0-9]{4,})")
NAME = "manifest.json"
BLOCK_BYTES = 2**21
"""What has a checksum of its own: the least that can be read and checked. 16 characters of manifest each."""


class DamagedError(CheckpointError):
    """A checkpoint that is not what was written: torn, truncated, altered. The one before is taken in its place."""


class NewerFormatError(CheckpointError):
    """A checkpoint of a newer dist_ft: sound, and not to be passed over."""


def _inside(path: str) -> str:
    parts = path.split("/")
    if (
        path.startswith("/")
        or "\\" in path
        or ":" in path
        or any(part in ("", ".", "..") for part in parts)
    ):
        raise ValueError(f"the path {path!r} leads out of the checkpoint")
    return path


RelativePath = Annotated[str, pydantic.AfterValidator(_inside)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", ser_json_inf_nan="strings")


class FileEntry(_Frozen):
    """One file: its path in the checkpoint's (or, for the ledger, the run's) folder, length and checksum.

    Attributes:
        shared: whether it lies in the run's own folder of what does not change, and other checkpoints name it too.
        blocks: xxh3_64 of every `block_bytes` of the file, one after the other; "" where only the whole has a checksum.
    """

    path: RelativePath
    num_bytes: int = Field(ge=0, lt=2**50)
    checksum: str = Field(pattern=r"^xxh3_128:[0-9a-f]{32}$")
    block_bytes: int = Field(0, ge=0, lt=2**50)
    blocks: str = Field("", pattern=r"^[0-9a-f]*$")
    shared: bool = False

    @pydantic.model_validator(mode="after")
    def _all_blocks(self) -> FileEntry:
        if len(self.blocks) != _DIGITS * (
            -(-self.num_bytes // self.block_bytes) if self.block_bytes else 0
        ):
            raise ValueError(
                f"{self.path}: {len(self.blocks)} characters of block checksums do not fit its length"
            )
        return self


class TensorInfo(_Frozen):
    """Shape of one whole tensor of the model."""

    shape: tuple[int, ...]


class LedgerEntry(_Frozen):
    """One segment of the ledger: the samples of steps [start, stop)."""

    start: int = Field(ge=0)
    stop: int = Field(ge=0)
    file: FileEntry


class Progress(_Frozen):
    """Where the run stands; the loader's position and the learning rate follow from `step`.

    Attributes:
        step: optimizer steps done.
        optimizer_step: updates the optimizer counts.
        num_tokens: tokens seen, padding left out.
        num_target_tokens: tokens learned from.
        history: (loss, gradient norm) of the last sound steps, where anomalies are judged by them.
        trained_s: seconds the steps so far took.
    """

    step: int = Field(ge=0)
    optimizer_step: int = Field(ge=0)
    num_tokens: int = 0
    num_target_tokens: int = 0
    history: tuple[tuple[float, float], ...] = ()
    trained_s: float = 0.0


class Manifest(_Frozen):
    """A whole checkpoint.

    Attributes:
        evaluation: held-out losses "before" and "after" the run; and "loss" and all metrics at this very step, where it
            was evaluated.
        frozen: names of the weights in the shared files: they do not learn, and were written once.
        layout: of a checkpoint on the workers' nodes: who wrote what; "" for one in storage.
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
    layout: str = ""
    created_at: str = ""
    versions: dict[str, str] = Field(default_factory=dict)


def compute_checksum(content: bytes | memoryview) -> str:
    """Return the checksum manifests carry. It finds damage; it is no signature."""
    return f"{_KIND}{xxhash.xxh3_128_hexdigest(content)}"


def file_entry(path: str, content: bytes | memoryview) -> FileEntry:
    """Return the manifest entry of a file with this content, which will be read whole."""
    return FileEntry(path=path, num_bytes=len(content), checksum=compute_checksum(content))


def file_entry_in_blocks(path: str, *parts: memoryview) -> FileEntry:
    """Return the manifest entry of a file with this content (all parts, each of bytes), which can be read in parts."""
    whole, block, digests, room = xxhash.xxh3_128(), xxhash.xxh3_64(), [], BLOCK_BYTES
    for part in parts:
        while len(part):
            piece, part = part[:room], part[room:]
            whole.update(piece)
            block.update(piece)
            room -= len(piece)
            if not room:
                digests.append(block.hexdigest())
                block, room = xxhash.xxh3_64(), BLOCK_BYTES
    if room < BLOCK_BYTES:
        digests.append(block.hexdigest())
    return FileEntry(
        path=path,
        num_bytes=sum(map(len, parts)),
        checksum=f"{_KIND}{whole.hexdigest()}",
        block_bytes=BLOCK_BYTES,
        blocks="".join(digests),
    )


def matches_checksum(entry: FileEntry, start: int, content: memoryview) -> bool:
    """Tell whether `content` is what `entry` says of its file from byte `start` on; whole blocks are needed."""
    if not entry.block_bytes:
        return len(content) == entry.num_bytes and compute_checksum(content) == entry.checksum
    first = start // entry.block_bytes * _DIGITS
    found = "".join(
        xxhash.xxh3_64_hexdigest(content[begin : begin + entry.block_bytes])
        for begin in range(0, len(content), entry.block_bytes)
    )
    return entry.blocks[first : first + len(found)] == found


def serialize_manifest(manifest: Manifest) -> bytes:
    """Return the file of `manifest`: JSON whose last field is the checksum of all before it."""
    body = manifest.model_dump_json(indent=1).encode()
    return body.removesuffix(_END) + _SEAL + compute_checksum(body).encode() + b'"' + _END


def parse_manifest(content: bytes, where: str) -> Manifest:
    """Return the manifest in `content`; raises DamagedError that names `where` for anything not sound."""
    body, _, sealed = content.rpartition(_SEAL)
    if sealed != compute_checksum(body + _END).encode() + b'"' + _END:
        raise DamagedError(
            f"{where}: torn or altered since it was written (its checksum differs); it will not be "
            "loaded"
        )
    try:
        manifest = Manifest.model_validate_json(content)
    except pydantic.ValidationError as error:
        first: Any = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise DamagedError(
            f"{where}: not a sound manifest ({place}: {first['msg']}); it will not be loaded"
        ) from error
    if manifest.format_version > FORMAT_VERSION:
        raise NewerFormatError(
            f"{where}: format_version={manifest.format_version} is newer than this dist_ft knows "
            f"({FORMAT_VERSION}); update dist_ft"
        )
    return manifest


def folder_name(step: int, attempt: int) -> str:
    """Return the folder of a checkpoint; attempts never share one, so a late writer spoils nothing."""
    return f"step-{step:09d}-a{attempt:04d}"


def parse_folder(name: str) -> tuple[int, int] | None:
    """Return (step, attempt) of a checkpoint folder's name, or None for another name."""
    found = _FOLDER.fullmatch(name)
    if found is None:
        return None
    step, attempt = int(found[1]), int(found[2])
    return (step, attempt) if folder_name(step, attempt) == name else None


def require_same_tensors(
    saved: dict[str, TensorInfo], wanted: dict[str, TensorInfo], where: str
) -> None:
    """Raise CheckpointError for the first weight that only one of checkpoint and model has, or of another shape."""
    for name in sorted(saved.keys() | wanted.keys()):
        has, needs = (
            str(list(side[name].shape)) if name in side else "absent" for side in (saved, wanted)
        )
        if has != needs:
            raise CheckpointError(
                f"{where}: {name} is {has} in the checkpoint and {needs} in the model; both must be "
                "the same; check model.path"
            )
