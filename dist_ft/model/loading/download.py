"""A model's files on this node: those of a bucket or the hub are downloaded once per node.

A local folder is used as it is. Guarantees: one process of a node downloads while others wait on a
file lock; files that are complete here are used without a request to the store, so that many
restarts do not load it; a file arrives with the length, and where the store provides one the
checksum, that it has there. Files that were changed or damaged here are detected and downloaded
again. Weights are downloaded only by callers that read them: reading a config, or resuming a run
from its own checkpoint, does not.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypedDict

from dist_ft.core import private_folders
from dist_ft.core.errors import FolderError, ModelError
from dist_ft.core.json_documents import decode_json
from dist_ft.core.logs import redact
from dist_ft.core.printable import printable_line
from dist_ft.storage import filesystem, local_files, places
from dist_ft.storage.error_messages import UnusableFileError
from dist_ft.storage.local_files import read_regular, require_regular_files

log = logging.getLogger("dist_ft.model")
CONFIG_PATTERNS = ("*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken")
WEIGHTS_PATTERN = "*.safetensors"
MARKER = ".complete"
"""File next to a model's files that lists the complete ones, see `_Marker`."""
BRANCH_MAX_AGE_S = 600.0
"""Age after which a branch or tag of the hub is requested again; commits never are."""
MAX_ATTEMPTS = 2
CachePart = Literal["models", "tokens", "shards", "wandb", "packages"]
"""The folders in data.cache_dir."""
_MD5 = re.compile(r'^"?([0-9a-f]{32})"?$')
_COMMIT = re.compile(r"^[0-9a-f]{40}$")


class _FileRecord(TypedDict):
    """A file as it was downloaded: length, modification time, XXH3 checksum."""

    num_bytes: int
    mtime_ns: int
    xxh3: str


class _Marker(TypedDict, total=False):
    """Content of a marker file.

    Attributes:
        weights: the files include weights.
        files: the complete files, by path relative to the folder.
        folder: folder of the hub's cache that holds the files.
        at: time of the download from the hub, in seconds since the epoch.
    """

    weights: bool
    files: dict[str, _FileRecord]
    folder: str
    at: float


def cache_root(configured: str | None) -> Path:
    """Return the folder that `data.cache_dir` names, which need not exist."""
    return Path(configured or "~/.cache/dist_ft").expanduser()


def cache_folder(configured: str | None, part: CachePart) -> Path:
    """Return the local folder for one kind of cached files, created if it is missing.

    Raises:
        FolderError: others own it or may write to it.
    """
    return private_folders.open_part(cache_root(configured), part, "data.cache_dir")


def create_in_cache(folder: Path) -> None:
    """Create a folder for one model in `cache_folder`, unless it exists.

    Raises:
        FolderError: the cache is full, broken, or shared and read-only for this user.
    """
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise FolderError(
            f"data.cache_dir: {folder} cannot be created ({error.strerror}). A new model needs a "
            "cache that this user can write to. Set data.cache_dir to a folder of your own."
        ) from error


def fetch_model(
    path: str, revision: str | None = None, cache_dir: str | None = None, weights: bool = True
) -> str:
    """Return a local folder with the model at `path`, downloaded once per node.

    Args:
        path: a folder, an fsspec URL of one, or a hub name.
        revision: revision on the hub.
        cache_dir: local folder for downloads; None: the default one.
        weights: also its weights; without them only config, tokenizer and templates.

    Raises:
        ModelError: no model is there, or its files arrive damaged.
    """
    if not filesystem.is_local(path):
        return _from_bucket(path, cache_folder(cache_dir, "models"), weights)
    local = filesystem.local_path(path)
    if os.path.isdir(local):
        _require_regular_files(local, path)
        return local

    # A hub name is org/name; anything else must be a folder and is not looked up on the hub.
    if path.startswith((".", "/", "~", "file:")) or path.count("/") != 1:
        raise ModelError(
            f"model.path={path}: the folder does not exist. Give a model folder, an fsspec URL of "
            "one, or a hub name such as org/name."
        )
    return _from_hub(path, revision, cache_folder(cache_dir, "models"), weights)


def require_base_near(base: str, adapter: str) -> None:
    """Refuse a base model that an adapter's folder names in another bucket or on another host.

    A path of this machine is allowed, and so is a name on the hub, whose host the user chose.

    Raises:
        ModelError: nothing was requested.
    """
    place = places.place_of(base)
    if place != places.LOCAL and not places.may_follow(base, adapter):
        raise ModelError(
            f"{places.not_followed('base.path', base, adapter)} Copy the base model to a folder, "
            "and name that as base.path in the adapter's dist_ft.json."
        )


def _require_regular_files(folder: str, path: str) -> None:
    """Raise ModelError if a file of a model's folder is a pipe, which loading would wait for."""
    try:
        require_regular_files(folder)
    except UnusableFileError as error:
        raise ModelError(
            printable_line(redact(f"model.path={path}: {error}. Remove it from the folder."))
        ) from error


def _from_bucket(url: str, cache: Path, weights: bool) -> str:
    """Return a mirror of the folder at `url`, below `cache`."""
    folder = cache / _hash(url)
    with _locked(folder):
        marker = _read_marker(folder / MARKER)
        intact = _intact_files(folder, marker.get("files", {}))
        has_weights = bool(marker.get("weights"))
        is_intact = bool(intact) and len(intact) == len(marker["files"])
        if is_intact and (has_weights or not weights):
            return str(folder)

        store = filesystem.Store(url)
        remote = store.file_infos()
        if "config.json" not in remote:
            raise ModelError(
                redact(
                    f"model.path={url}: it has no config.json. Give the folder that "
                    "save_pretrained wrote (config.json, *.safetensors, tokenizer files)."
                )
            )

        # What was downloaded before with weights stays complete.
        weights = weights or has_weights
        needed = {name: info for name, info in remote.items() if is_model_file(name, weights)}
        files, missing = {}, {}
        for name, info in needed.items():
            if name in intact and intact[name]["num_bytes"] == info["size"]:
                files[name] = intact[name]
            else:
                missing[name] = info

        # The marker comes last: after a crash the files are not known, and are downloaded again.
        files |= _download(store, folder, missing)
        _write_marker(folder / MARKER, {"weights": weights, "files": files})
    return str(folder)


def is_model_file(name: str, weights: bool) -> bool:
    """Whether a file of a model's folder is downloaded; pickles never are."""
    patterns: tuple[str, ...] = CONFIG_PATTERNS
    if weights:
        patterns = (*patterns, WEIGHTS_PATTERN)
    return any(Path(name).match(pattern) for pattern in patterns)


def _download(
    store: filesystem.Store, folder: Path, files: Mapping[str, filesystem.FileInfo]
) -> dict[str, _FileRecord]:
    """Copy files, compare them with the store's info, and return their records."""
    records = {}
    pending = dict(files)
    for _ in range(MAX_ATTEMPTS):
        # A second download repairs damage on the way, not damage in the store.
        store.download(str(folder), pending.__contains__)
        for name, info in list(pending.items()):
            if _matches(folder / name, info):
                records[name] = _record(folder / name)
                del pending[name]
        if not pending:
            return records

    name = min(pending)
    raise ModelError(
        f"{store.redacted_url(name)}: the downloaded file is not the one the store describes "
        f"({pending[name]['size']} bytes, checksum {pending[name]['version']}). It is damaged "
        "there, or was changed during the download. Try again, or write it again."
    )


def _matches(path: Path, info: filesystem.FileInfo) -> bool:
    """Whether a file has the store's length, and its MD5 if the store's version is one."""
    if not path.is_file() or path.stat().st_size != info["size"]:
        return False

    # S3: of an object that was uploaded in one part and is not encrypted by KMS.
    md5 = _MD5.match(str(info["version"]))
    if md5 is None:
        return True
    return _digest(path, hashlib.md5(usedforsecurity=False)) == md5[1]


def _from_hub(name: str, revision: str | None, cache: Path, weights: bool) -> str:
    """Return a hub repository's folder in the hub's own cache.

    HF_TOKEN in the environment gives access to gated ones.
    """
    from huggingface_hub import snapshot_download

    marker_folder = cache / f"hub-{_hash(f'{name}@{revision}')}"
    with _locked(marker_folder):
        # The hub's own cache knows neither damage nor which files were requested before.
        marker = _read_marker(marker_folder / MARKER)
        files = marker.get("files", {})
        folder = Path(marker.get("folder", ""))
        intact = _intact_files(folder, files)

        is_damaged = bool(files) and len(intact) < len(files)
        is_commit = bool(_COMMIT.match(revision or ""))
        is_current = is_commit or time.time() - marker.get("at", 0) < BRANCH_MAX_AGE_S
        has_weights = bool(marker.get("weights"))
        if files and not is_damaged and is_current and (has_weights or not weights):
            return str(folder)

        weights = weights or has_weights
        patterns = list(CONFIG_PATTERNS)
        if weights:
            patterns.append(WEIGHTS_PATTERN)
        try:
            # Forced, because otherwise the hub's cache takes a damaged file for a complete one.
            folder = Path(
                snapshot_download(
                    name,
                    revision=revision,
                    force_download=is_damaged,
                    allow_patterns=patterns,
                )
            )
        except Exception as error:
            raise ModelError(
                redact(
                    f"model.path={name}: the folder does not exist here, and the hub does not "
                    f"provide it ({type(error).__name__}). Check the spelling, set HF_TOKEN for a "
                    "gated model, or give a local folder."
                )
            ) from error

        # A branch that moved has a new folder; only records of the same one spare a checksum.
        is_same_folder = str(folder) == marker.get("folder")
        records: dict[str, _FileRecord] = {}
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                relative = path.relative_to(folder).as_posix()
                if relative in intact and is_same_folder:
                    records[relative] = intact[relative]
                else:
                    records[relative] = _record(path)
        _write_marker(
            marker_folder / MARKER,
            {"weights": weights, "folder": str(folder), "at": time.time(), "files": records},
        )
    return str(folder)


def _intact_files(folder: Path, files: Mapping[str, _FileRecord]) -> dict[str, _FileRecord]:
    """Return the `files` that are as recorded: same length, and same time or checksum."""
    intact: dict[str, _FileRecord] = {}
    for name, record in files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != record["num_bytes"]:
            log.warning("%s: not the downloaded file; downloading it again", path)
            continue

        # The checksum of a large model takes minutes, so the time decides if it is unchanged.
        if path.stat().st_mtime_ns != record["mtime_ns"]:
            # It was touched; only its content decides.
            checksum = _record(path)["xxh3"]
            if checksum != record["xxh3"]:
                log.warning(
                    "%s: not the downloaded file (checksum %s, was %s); downloading it again",
                    path,
                    checksum,
                    record["xxh3"],
                )
                continue

        intact[name] = record
    return intact


def _record(path: Path) -> _FileRecord:
    import xxhash

    stat = path.stat()
    return {
        "num_bytes": stat.st_size,
        "mtime_ns": stat.st_mtime_ns,
        "xxh3": _digest(path, xxhash.xxh3_128()),
    }


def _digest(path: Path, hasher: Any) -> str:
    with open(path, "rb") as file:
        while chunk := file.read(2**22):
            hasher.update(chunk)
    return str(hasher.hexdigest())


def _hash(text: str) -> str:
    import xxhash

    return xxhash.xxh3_128_hexdigest(text.encode())


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Create a folder of the cache and hold its lock."""
    create_in_cache(folder)
    with local_files.locked(f"{folder}.lock"):
        _remove_leftovers(folder)
        yield


def _remove_leftovers(folder: Path) -> None:
    """Remove marker files of a killed process, which held the lock that this one holds now."""
    with contextlib.suppress(OSError):  # a shared cache may be read-only
        for path in folder.glob(f"{local_files.HIDDEN}*"):
            path.unlink()


def _read_marker(path: Path) -> _Marker:
    """Return a marker's content; an empty one if it is absent, damaged, or of an older version."""
    try:
        content = decode_json(read_regular(path))
    except (OSError, ValueError):
        return {}
    if not isinstance(content, dict) or not {"weights", "files"} <= content.keys():
        return {}
    marker: _Marker = content  # type: ignore[assignment]
    return marker


def _write_marker(path: Path, marker: _Marker) -> None:
    local_files.write_file(str(path), json.dumps(marker).encode())
