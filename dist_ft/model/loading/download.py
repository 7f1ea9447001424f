"""A model's files on this node: a folder as it is; a bucket's or the hub's fetched once a node, for all its workers.

Guarantees: one process of a node fetches while others wait on a file lock; what is here and sound is used without a
word to the store, so a storm of restarts does not reach it; a file arrives with the length, and where the store tells
one the checksum, it has there. What was changed or damaged here since is noticed and fetched anew. Weights are fetched
only by who reads them: a look at a config, or a run that goes on from its own checkpoint, does not.
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
from typing import Any

from dist_ft.core.errors import ModelError
from dist_ft.core.logs import redact
from dist_ft.storage import filesystem

log = logging.getLogger("dist_ft.model")
CONFIG_PATTERNS = ("*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken")
WEIGHTS_PATTERN = "*.safetensors"
MARKER = ".complete"
"""File beside a model's: which files are whole here: {weights, files: {name: {num_bytes, mtime_ns, xxh3}}}."""
BRANCH_MAX_AGE_S = 600.0
"""A branch or tag of the hub is asked for anew after so long: it may have moved; a commit never."""
MAX_ATTEMPTS = 2
_MD5 = re.compile(r'^"?([0-9a-f]{32})"?$')
_COMMIT = re.compile(r"^[0-9a-f]{40}$")


def cache_folder(configured: str | None) -> Path:
    """Return the local folder for fetched models and tokenised shards."""
    return Path(configured or "~/.cache/dist_ft").expanduser()


def fetch_model(
    path: str, revision: str | None = None, cache_dir: str | None = None, weights: bool = True
) -> str:
    """Return a local folder with the model at `path`, fetched once a node (others wait on a file lock).

    weights: also its weights; without them config, tokenizer and templates are enough.
    """
    if filesystem.is_local(path):
        local = filesystem.local_path(path)
        if os.path.isdir(local):
            return local
        if path.startswith((".", "/", "~", "file:")) or path.count("/") != 1:
            raise ModelError(
                f"model.path={path}: there is no such folder; give a model folder, an fsspec URL of one, "
                "or a hub name such as org/name"
            )
        return _from_hub(path, revision, cache_folder(cache_dir) / "models", weights)
    return _from_bucket(path, cache_folder(cache_dir) / "models", weights)


def _from_bucket(url: str, cache: Path, weights: bool) -> str:
    """Mirror the folder at `url` below `cache`."""
    folder = cache / _name(url)
    with _alone(folder):
        kept = _marker(folder / MARKER)
        sound = _sound(folder, kept.get("files", {}))
        if sound and len(sound) == len(kept["files"]) and (kept["weights"] or not weights):
            return str(folder)
        store = filesystem.Store(url)
        there = store.about()
        if "config.json" not in there:
            raise ModelError(
                redact(
                    f"model.path={url}: no config.json there; give the folder that save_pretrained "
                    "wrote (config.json, *.safetensors, tokenizer files)"
                )
            )
        weights = weights or bool(kept.get("weights"))
        wanted = {name: about for name, about in there.items() if is_model_file(name, weights)}
        absent = {
            name
            for name, about in wanted.items()
            if name not in sound or sound[name]["num_bytes"] != about["size"]
        }
        found = {
            name: about for name, about in sound.items() if name in wanted and name not in absent
        }
        found |= _download(store, folder, {name: wanted[name] for name in absent})
        _write(folder / MARKER, {"weights": weights, "files": found})
    return str(folder)


def is_model_file(name: str, weights: bool) -> bool:
    """Tell whether a file of a model's folder is read: never a pickle."""
    return any(Path(name).match(pattern) for pattern in (*CONFIG_PATTERNS, *([WEIGHTS_PATTERN] if weights else [])))


def _download(
    store: filesystem.Store, folder: Path, wanted: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Copy files, hold them against what the store says of them, and return what is noted of each."""
    found, left = {}, dict(wanted)
    for _ in range(MAX_ATTEMPTS):
        store.download(str(folder), left.__contains__)
        for name, about in list(left.items()):
            if _matches(folder / name, about):
                found[name] = _noted(folder / name)
                del left[name]
        if not left:
            return found
    name = min(left)
    raise ModelError(
        f"{store.shown(name)}: what arrives is not what the store says it has ({left[name]['size']} "
        f"bytes, checksum {left[name]['version']}); the file there is damaged, or was changed meanwhile; "
        "try again, or write it anew"
    )


def _matches(path: Path, about: Mapping[str, Any]) -> bool:
    """Tell whether a file has the length, and the MD5 where the version is one, that the store told."""
    if not path.is_file() or path.stat().st_size != about["size"]:
        return False
    md5 = _MD5.match(
        str(about["version"])
    )  # S3: of an object uploaded in one part and not encrypted by KMS
    return md5 is None or _digest(path, hashlib.md5(usedforsecurity=False)) == md5[1]


def _from_hub(name: str, revision: str | None, cache: Path, weights: bool) -> str:
    """Return a hub repository's folder in the hub's own cache (HF_TOKEN from the environment opens gated ones)."""
    from huggingface_hub import snapshot_download

    beside = cache / f"hub-{_name(f'{name}@{revision}')}"
    with _alone(beside):
        kept = _marker(beside / MARKER)
        files, folder = kept.get("files", {}), Path(kept.get("folder", ""))
        sound = _sound(folder, files)
        damaged = bool(files) and len(sound) < len(files)
        lasting = bool(_COMMIT.match(revision or "")) or time.time() - kept.get("at", 0) < BRANCH_MAX_AGE_S
        if files and not damaged and lasting and (kept["weights"] or not weights):
            return str(folder)
        weights = weights or bool(kept.get("weights"))
        try:
            folder = Path(
                snapshot_download(
                    name,
                    revision=revision,
                    force_download=damaged,
                    allow_patterns=[*CONFIG_PATTERNS, *([WEIGHTS_PATTERN] if weights else [])],
                )
            )
        except Exception as error:
            raise ModelError(
                redact(
                    f"model.path={name}: no folder of that name here, and the hub does not give it "
                    f"({type(error).__name__}); check the spelling, set HF_TOKEN for a gated model, or give a local folder"
                )
            ) from error
        names = (
            path.relative_to(folder).as_posix()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        )
        found = {
            one: sound[one]
            if one in sound and str(folder) == kept["folder"]
            else _noted(folder / one)
            for one in names
        }
        _write(
            beside / MARKER,
            {"weights": weights, "folder": str(folder), "at": time.time(), "files": found},
        )
    return str(folder)


def _sound(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return those of `files` that are what was noted: by length and time, by checksum where the time is another."""
    found = {}
    for name, about in files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != about["num_bytes"]:
            log.warning("%s: is not what was fetched; it is fetched anew", path)
        elif (
            path.stat().st_mtime_ns != about["mtime_ns"]
            and (noted := _noted(path))["xxh3"] != about["xxh3"]
        ):
            log.warning(
                "%s: is not what was fetched (checksum %s, %s then); it is fetched anew",
                path,
                noted["xxh3"],
                about["xxh3"],
            )
        else:
            found[name] = dict(about)
    return found


def _noted(path: Path) -> dict[str, Any]:
    import xxhash

    about = path.stat()
    return {
        "num_bytes": about.st_size,
        "mtime_ns": about.st_mtime_ns,
        "xxh3": _digest(path, xxhash.xxh3_128()),
    }


def _digest(path: Path, sum_of: Any) -> str:
    with open(path, "rb") as file:
        while part := file.read(2**22):
            sum_of.update(part)
    return str(sum_of.hexdigest())


def _name(text: str) -> str:
    import xxhash

    return xxhash.xxh3_128_hexdigest(text.encode())


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Make a folder of the cache and hold its lock."""
    from filelock import FileLock

    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        yield


def _marker(path: Path) -> dict[str, Any]:
    """Return what a marker says; nothing for none, a damaged one, or one of an older version."""
    try:
        found = json.loads(path.read_text("utf-8"))
        return found if isinstance(found, dict) and {"weights", "files"} <= found.keys() else {}
    except (OSError, ValueError):
        return {}


def _write(path: Path, what: Mapping[str, Any]) -> None:
    from dist_ft.storage.local_files import write_file

    write_file(str(path), json.dumps(what).encode())
